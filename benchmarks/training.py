"""Images per second of whole training steps: without clipping, with timm's AGC and with ours.

    python -m benchmarks.training [--models ...] [--batches 64 256] [--out out/training.csv]

A step is forward, backward and SGD with Nesterov momentum, in bf16 autocast and channels_last on
random images that are on the device already. The three train copies of one network, each with a
turn of several steps in every round; the first round warms up. A picture lies beside the CSV,
which has a row per turn.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from agc_triton import SGD_AGC, param_groups
from benchmarks.lib import plots
from benchmarks.lib.arguments import add_device, check_file, parser_of, positive
from benchmarks.lib.machine import device_name, timestamp
from benchmarks.lib.networks import Network, default_network, is_known, network
from benchmarks.lib.optimizers import backend
from benchmarks.lib.peers import timm_clip_without_head
from benchmarks.lib.rows import write
from benchmarks.lib.versions import our_version, triton_version

THREADS = 2
CLIPPING = 0.01
DTYPE = torch.bfloat16
# Small enough that random images, which cannot be learned, do not break the network.
OPTIONS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "nesterov": True}
KEYS = ["model", "pixels", "batch", "implementation"]
COLUMNS = [
    *("model", "parameters", "tensors", "pixels", "batch", "implementation", "version", "role"),
    *("backend", "device", "threads", "dtype", "turn", "steps", "images_per_s", "loss"),
    *("torch", "triton", "timestamp"),
]


class Trainer(NamedTuple):
    """One implementation with a network of its own; ``clip`` comes before the optimizer's step."""

    implementation: str
    version: str
    role: str
    model: nn.Module
    optimizer: Optimizer
    clip: Callable[[], object]

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and step; the loss is left where it is."""
        with torch.autocast(images.device.type, DTYPE):
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def trainers(model: nn.Module) -> list[Trainer]:
    """What is compared, each with a copy of the model."""
    plain, theirs, ours = (copy.deepcopy(model) for _ in range(3))
    torch_version = f"torch {torch.__version__}"

    def sgd(model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), **OPTIONS, fused=True)

    clip, version = timm_clip_without_head(theirs, CLIPPING)
    fused = SGD_AGC(param_groups(ours, clipping=CLIPPING), **OPTIONS)
    own_version = f"agc_triton {our_version()}"
    return [
        Trainer("SGD_AGC", own_version, "ours", ours, fused, nothing),
        Trainer("timm AGC, SGD fused", version, "peer", theirs, sgd(theirs), clip),
        Trainer("SGD fused, unclipped", torch_version, "unclipped", plain, sgd(plain), nothing),
    ]


def nothing() -> None:
    """Stands in for clipping."""


def random_batch(of: Network, batch: int, on: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    images = torch.randn(batch, of.channels, of.pixels, of.pixels, device=on)
    labels = torch.randint(of.classes, (batch,), device=on)
    return images.to(memory_format=torch.channels_last), labels


def measure(name: str, of: Network, batch: int, args: argparse.Namespace) -> pd.DataFrame:
    """A row per turn of each implementation."""
    on = torch.device(args.device)
    model = of.model.to(on, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    images, labels = random_batch(of, batch, on)
    compared = trainers(model)
    common = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
        "pixels": of.pixels,
        "batch": batch,
        "device": device_name(on),
        "threads": torch.get_num_threads(),
        "dtype": f"{str(DTYPE).removeprefix('torch.')} autocast",
        "steps": args.steps,
        "torch": torch.__version__,
        "triton": triton_version(),
    }
    order, rows = random.Random(0), []
    for turn in tqdm(range(args.turns + 1), f"{name}, batch {batch}", unit="turn", disable=None):
        for trainer in order.sample(compared, len(compared)):
            rate, loss = time_turn(trainer, images, labels, args.steps)
            found = {
                "implementation": trainer.implementation,
                "version": trainer.version,
                "role": trainer.role,
                "backend": backend(trainer.optimizer),
                "turn": turn,
                "images_per_s": rate,
                "loss": loss,
                "timestamp": timestamp(),
            }
            rows += [{**common, **found}] if turn else []  # the first warms up
    table = pd.DataFrame(rows)[COLUMNS]
    names = [trainer.implementation for trainer in compared]
    return table.sort_values("implementation", key=lambda x: x.map(names.index), kind="stable")


def time_turn(trainer: Trainer, images: Tensor, labels: Tensor, steps: int) -> tuple[float, float]:
    """Images per second of some steps in a row, and the last loss."""
    wait(images.device)
    start = time.perf_counter()
    for _ in range(steps):
        loss = trainer.step(images, labels)
    wait(images.device)
    seconds = time.perf_counter() - start
    return steps * len(images) / seconds, loss.item()


def wait(on: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Median, slowest and fastest turn, and how many times the images of the other two that is."""
    turns = table.groupby([*KEYS, "role"], sort=False)["images_per_s"]
    found = turns.agg(["median", "min", "max"]).reset_index()
    for role, column in {"peer": "times_timm", "unclipped": "times_unclipped"}.items():
        other = found[found["role"] == role].set_index(KEYS[:-1])["median"]
        of_group = pd.MultiIndex.from_frame(found[KEYS[:-1]])
        found[column] = found["median"] / other.reindex(of_group).to_numpy()
    return found.drop(columns="role")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure model by model; the CSV has every batch size that was finished."""
    parser = parser_of("training", __doc__)
    parser.add_argument("--models", nargs="+", help="timm's names, or demo_nfnet, the demo's own")
    parser.add_argument("--pixels", type=positive, help="default: 192, or 8 of the demo's own")
    parser.add_argument("--batches", nargs="+", type=positive, default=[64, 256])
    parser.add_argument("--turns", type=positive, default=5, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=positive, default=20, help="of a turn; default: %(default)s"
    )
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("out/training.csv"))
    args = parser.parse_args(argv)
    models = args.models or [default_network(args.device)]
    for name in models:
        if not is_known(name):
            parser.error(f"argument --models: {name} is no model of timm's, if there is timm")
    check_file(parser, args.out)
    torch.set_num_threads(THREADS)
    tables: list[pd.DataFrame] = []
    for name in models:
        for batch in args.batches:
            searched = torch.backends.cudnn.flags(enabled=True, benchmark=args.device == "cuda")
            try:
                with searched:
                    tables.append(measure(name, network(name, args.pixels), batch, args))
            except torch.OutOfMemoryError as error:
                tqdm.write(f"{name}, batch {batch} is left out: {error}")
                continue
            table = pd.concat(tables, ignore_index=True)
            write(table, args.out)
    if not tables:
        parser.error("memory has no room for any of it")
    print(summarize(table).to_string(index=False, float_format="{:,.2f}".format))
    print(f"on {device_name(torch.device(args.device))}; every turn is in {args.out}")
    print(f"drawn in {plots.training(table, args.out)}")


if __name__ == "__main__":
    main()
