"""Python's part of a step: `AdamW_AGC` on the Triton path beside torch's fused AdamW, no launches.

    python -m benchmarks.host_cost [--quick] [--calls 200] [--plot] [--out out/host_cost.csv]

Both run on CPU tensors with their launches replaced by functions that do nothing, in one process.
``steady`` steps find everything as it was; before a ``changing`` step the learning rate has moved
and every gradient is a new tensor, as in training with zero_grad(set_to_none=True). With ``cold``
caches the two take turns call by call and each meets what the other left; with ``warm`` ones each
makes a block of calls in a row, as microbenchmarks do. Training lies between the two. Kinds and
caches take turns as well.

Others are `AdamW_AGC` recording the ratios of all units in every step (`track_clipping`), and
`AdamW_AGC` on DTensors, as the first of two ranks that share them: half of its tensors have units
of their own, half are parts of a unit (no other rank is there: sums over ranks go nowhere). The
last does nothing but read where gradients, parameters and states lie, which a step that may not
write to memory it no longer owns has to do: how much cheaper than torch any plan can be.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    # CPU tensors are taken by the Triton path only where kernels would be interpreted.
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm

from agc_triton import AdamW_AGC
from agc_triton.optim import OPTIMIZERS as REGISTRY
from agc_triton.triton_path.launches import Launch
from benchmarks.lib import growth, plots
from benchmarks.lib.arguments import check_file, parser_of, positive
from benchmarks.lib.machine import cpu_name, timestamp
from benchmarks.lib.rows import quantiles, write
from benchmarks.lib.sharding import placed
from benchmarks.lib.versions import triton_version

OURS, THEIRS, FLOOR = "AdamW_AGC triton", "torch AdamW fused", "reading addresses only"
SHARDED = "AdamW_AGC triton, one of two ranks"
TRACKED = "AdamW_AGC triton, every step tracked"
KINDS = ("steady", "changing")
TURN = 20  # calls of each implementation, or as many as are asked for
CACHES = ("warm", "cold")

TENSORS = (30, 100, 233, 600, 1457, 3000)
GROUPS = (1, 10, 50, 100, 300)
GROUPED = 600  # tensors, dealt out to these groups

COLUMNS = [
    *("implementation", "tensors", "groups", "kind", "caches", "median_us", "p20_us", "p80_us"),
    *("us_per_tensor", "times_cheaper_than_torch", "device", "calls"),
    *("torch", "triton", "timestamp"),
]


class AddressesOnly(AdamW):
    """Steps that read every address once and keep it, and do nothing else."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it per closure type
        """Read them."""
        if not self.state:
            super().step(closure)
        entries = list(self.state.values())
        params = [p for group in self.param_groups for p in group["params"]]
        roles: list[Any] = [params, [p.grad for p in params]]
        roles += [map(itemgetter(key), entries) for key in ("exp_avg", "exp_avg_sq")]
        self.addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in roles]
        return None


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


@contextmanager
def two_ranks() -> Iterator[DeviceMesh]:
    """The first of two ranks; what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def shared(mesh: DeviceMesh, tensors: int) -> list[Parameter]:
    """Parameters of which 64 elements lie here: some rows, or a part of one unit."""
    whole = [torch.randn((16, 8) if i % 2 else (128,)) for i in range(tensors)]
    return [Parameter(placed(t, mesh, [Shard(0)])) for t in whole]


def plain(tensors: int) -> list[Parameter]:
    """Parameters of 64 elements."""
    return [Parameter(torch.randn(64)) for _ in range(tensors)]


def build(
    make: Callable[..., Optimizer], params: list[Parameter], groups: int, **options: Any
) -> Optimizer:
    """An optimizer over parameters with gradients, dealt out to equal groups."""
    for p in params:
        p.grad = like(p.detach())
    dealt = [{"params": params[i::groups], "weight_decay": 0.01 * i} for i in range(groups)]
    return make(dealt, **options)


def like(grad: Tensor) -> Tensor:
    """Another one; of a DTensor with its own spec, as fully_shard makes them."""
    if isinstance(grad, DTensor):
        local = torch.empty_like(grad.to_local())
        return DTensor(local, grad._spec, requires_grad=False)  # type: ignore[no-untyped-call]  # torch has no types for it
    return torch.empty_like(grad)


def change(optimizer: Optimizer) -> None:
    """What differs from one step of training to the next."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.999
        for p in group["params"]:
            p.grad = like(p.grad)


def measure(
    mesh: DeviceMesh, tensors: int, groups: int, calls: int, others: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows for all implementations: steady and changing, with warm and cold caches.

    ``others`` are those of our optimizers to measure beside AdamW_AGC.
    """
    made = {f"{name}_AGC triton": REGISTRY[name] for name in others}
    optimizers = {
        **{n: build(make, plain(tensors), groups, backend="triton") for n, make in made.items()},
        OURS: build(AdamW_AGC, plain(tensors), groups, backend="triton"),
        TRACKED: build(AdamW_AGC, plain(tensors), groups, backend="triton"),
        THEIRS: build(AdamW, plain(tensors), groups, fused=True),
        SHARDED: build(AdamW_AGC, shared(mesh, tensors), groups, backend="triton"),
        FLOOR: build(AddressesOnly, plain(tensors), groups, fused=True),
    }
    tracked: Any = optimizers[TRACKED]
    tracked.track_clipping(1, warn=False)  # the warning's first steps are not those of training
    times = time_in_turns(optimizers, calls)
    found = {key: quantiles(pd.Series(values), "median_us", "us") for key, values in times.items()}
    rows = []
    for kind, caches, name in product(KINDS, CACHES, optimizers):
        of_one, of_torch = found[name, kind, caches], found[THEIRS, kind, caches]
        rows.append(
            {
                **{"implementation": name, "tensors": tensors, "groups": groups},
                **{"kind": kind, "caches": caches, **of_one},
                "us_per_tensor": of_one["median_us"] / tensors,
                "times_cheaper_than_torch": of_torch["median_us"] / of_one["median_us"],
                **{"device": cpu_name(), "calls": calls, "torch": torch.__version__},
                **{"triton": triton_version(), "timestamp": timestamp()},
            }
        )
    return rows


def time_in_turns(
    optimizers: dict[str, Optimizer], calls: int
) -> dict[tuple[str, str, str], list[float]]:
    """Microseconds of at least so many calls of each, by name, kind and caches.

    Everything takes turns, in a new order each time, so that drift of the machine hits all alike.
    """
    order, settings = random.Random(0), list(product(KINDS, CACHES))
    turn = min(TURN, calls)
    # Consecutive calls of one implementation, by what they do to the caches.
    blocks = {"warm": turn, "cold": 1}
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(1 + -(-calls // turn)):
        for kind, caches in order.sample(settings, len(settings)):
            for _ in range(turn // blocks[caches]):
                for name, optimizer in optimizers.items():
                    times[name, kind, caches] += time_block(optimizer, kind, blocks[caches])
    return {key: values[turn:] for key, values in times.items()}  # the first turn warms up


def time_block(optimizer: Optimizer, kind: str, calls: int) -> list[float]:
    """Microseconds of calls in a row."""
    times = []
    for _ in range(calls):
        if kind == "changing":
            change(optimizer)
        start = time.perf_counter()
        optimizer.step()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def verdicts(table: pd.DataFrame) -> list[str]:
    """Whether a step costs more per tensor, or per group, than one with fewer of them.

    Tensors that the caches no longer hold cost either implementation more: torch's lines tell.
    """
    fixed = {"tensors": table["groups"] == 1, "groups": table["tensors"] == grouped(table)}
    lines = []
    for (axis, rows), kind, caches in product(fixed.items(), KINDS, CACHES):
        for name in (OURS, THEIRS):
            of_name = rows & (table["implementation"] == name)
            line = table[of_name & (table["kind"] == kind) & (table["caches"] == caches)]
            lines.append(f"{axis}, {kind}, {caches} caches, {name}: {verdict(line, axis)}")
    return lines


def verdict(line: pd.DataFrame, axis: str) -> str:
    """The cost of each along an axis at its end, and where it is beyond what fewer cost each."""
    line = line.sort_values(axis)
    cost, counts = line["median_us"], line[axis]
    if axis == "groups":  # the tensors, as many in all rows, have a cost of their own
        each, what = growth.of_each_more(cost, counts), "group more"
    else:
        each, what = cost / counts, "tensor"
    last = f"{each.iloc[-1]:.3g} us per {what} at {counts.iloc[-1]:,}"
    return f"{last}; {growth.verdict(growth.over_cheapest_smaller(each), counts)}"


def of_adamw(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that a picture has room for."""
    return table[table["implementation"].isin([OURS, TRACKED, THEIRS, SHARDED, FLOOR])]


def grouped(table: pd.DataFrame) -> int:
    """The number of tensors that the cases with several groups have."""
    return int(table.sort_values("groups")["tensors"].iloc[-1])


def cases(quick: bool) -> list[tuple[int, int]]:
    """Tensors and groups."""
    if quick:
        return [(30, 1), (60, 1), (60, 10)]
    return [(n, 1) for n in TENSORS] + [(GROUPED, groups) for groups in GROUPS[1:]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure over numbers of tensors and of groups; print and write every row."""
    parser = parser_of("host_cost", __doc__)
    parser.add_argument("--calls", type=positive, default=200, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="three small cases")
    parser.add_argument(
        "--optimizers", nargs="+", default=[], choices=REGISTRY, help="beside AdamW"
    )
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/host_cost.csv"))
    args = parser.parse_args(argv)
    check_file(parser, args.out)
    rows = []
    with two_ranks() as mesh, no_launches():
        for tensors, groups in tqdm(cases(args.quick), desc="host cost", disable=None):
            rows += measure(mesh, tensors, groups, args.calls, args.optimizers)
            table = pd.DataFrame(rows)[COLUMNS]
            write(table, args.out)
    shown = table[COLUMNS[: COLUMNS.index("device")]]
    print(shown.to_string(index=False, float_format="{:.2f}".format))
    print("\n".join(verdicts(table)))
    print(f"on {cpu_name()}; every row is in {args.out}")
    if args.plot:
        print(f"drawn in {plots.host_cost(of_adamw(table), args.out)}")


if __name__ == "__main__":
    main()
