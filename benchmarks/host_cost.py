"""Python's part of a step: `AdamW_AGC` on the Triton path beside torch's fused AdamW, no launches.

    python -m benchmarks.host_cost [--rounds 200] [--plot] [--out out/host_cost.csv]

Both run on CPU tensors with their launches replaced by functions that do nothing, in turns in one
process. ``steady`` steps find everything as it was; before a ``changing`` step the learning rate
has moved and every gradient is a new tensor, as in training with zero_grad(set_to_none=True).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# CPU tensors are taken by the Triton path only where kernels would be interpreted.
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pandas as pd  # after the line above
import torch  # likewise
from torch.nn import Parameter  # likewise
from torch.optim import AdamW, Optimizer  # likewise
from tqdm import tqdm  # likewise

from agc_triton import AdamW_AGC  # likewise
from agc_triton.kernels.launch import Launch  # likewise
from benchmarks import plots  # likewise
from benchmarks.runner import cpu_name  # likewise

TENSORS = (30, 100, 233, 600, 1457, 3000)
GROUPS = (1, 10, 50, 100, 300)


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for a launch."""


@contextmanager
def no_launches() -> Iterator[None]:
    """Replace what either implementation starts on the device."""
    with (
        mock.patch.object(Launch, "fire", nothing),
        mock.patch.object(torch, "_fused_adamw_", nothing),
        mock.patch.object(torch, "_foreach_add_", nothing),
    ):
        yield


def build(make: Callable[..., Optimizer], tensors: int, groups: int, **options: Any) -> Optimizer:
    """An optimizer over small parameters with gradients, dealt out to equal groups."""
    params = [Parameter(torch.randn(64)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(64)
    dealt = [{"params": params[i::groups], "weight_decay": 0.01 * i} for i in range(groups)]
    return make(dealt, **options)


def change(optimizer: Optimizer, i: int) -> None:
    """What differs from one step of training to the next."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 / (1 + i)
        for p in group["params"]:
            p.grad = torch.empty_like(p)


def measure(tensors: int, groups: int, rounds: int) -> list[dict[str, Any]]:
    """Rows for both implementations, steady and changing."""
    optimizers = {
        "AdamW_AGC triton": build(AdamW_AGC, tensors, groups, backend="triton"),
        "torch AdamW fused": build(AdamW, tensors, groups, fused=True),
    }
    rows = []
    for kind in ("steady", "changing"):
        times: dict[str, list[float]] = {name: [] for name in optimizers}
        for i in range(-3, rounds):
            for name, optimizer in optimizers.items():
                if kind == "changing":
                    change(optimizer, i + 3)
                start = time.perf_counter()
                optimizer.step()
                if i >= 0:
                    times[name].append((time.perf_counter() - start) * 1e6)
        theirs = statistics.median(times["torch AdamW fused"])
        for name, values in times.items():
            median = statistics.median(values)
            row = {"implementation": name, "tensors": tensors, "groups": groups, "kind": kind}
            per_tensor = {"median_us": median, "us_per_tensor": median / tensors}
            rows.append({**row, **per_tensor, "times_cheaper_than_torch": theirs / median})
    return rows


def main() -> None:
    """Measure over numbers of tensors and of groups; print and write every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/host_cost.csv"))
    args = parser.parse_args()
    cases = [(n, 1) for n in TENSORS] + [(600, groups) for groups in GROUPS[1:]]
    with no_launches():
        rows = [
            row
            for tensors, groups in tqdm(cases, desc="host cost", disable=None)
            for row in measure(tensors, groups, args.rounds)
        ]
    table = pd.DataFrame(rows).assign(
        device=cpu_name(), rounds=args.rounds, torch=torch.__version__
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    print(table.drop(columns=["device", "rounds", "torch"]).to_string(index=False))
    print(f"on {cpu_name()}; every row is in {args.out}")
    if args.plot:
        print(f"drawn in {plots.host_cost(table, args.out)}")


if __name__ == "__main__":
    main()
