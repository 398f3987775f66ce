"""A sharded step of AdamW_AGC beside torch's AdamW, as it comes and fused, and an unsharded step.

    python -m benchmarks.sharded [--model resnet50] [--ranks 1 2 4] [--steps 20] [--out CSV]

Every parameter is sharded along dimension 0, as fully_shard does. All ranks start a step together;
implementations take turns, and a row is of the slowest rank's medians. Unsharded are the same
pieces of memory as plain tensors, whose units are then other ones. Ranks are processes of gloo, or
with --device cuda one of NCCL.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from agc_triton import AdamW_AGC
from benchmarks.lib.arguments import add_device, check_file, parser_of, positive
from benchmarks.lib.machine import cores, device_name, timestamp
from benchmarks.lib.rows import quantiles, write
from benchmarks.lib.sharding import placed
from benchmarks.lib.workloads import Workload, model_names, random_workload, workload_of

OURS, UNSHARDED = "AdamW_AGC", "AdamW_AGC, unsharded"
TORCH, FUSED = "torch AdamW", "torch AdamW fused"
TINY = [(64, 32), (64,), (10, 64), (10,)]
COLUMNS = [
    *("model", "tensors", "ranks", "implementation", "median_ms", "p20_ms", "p80_ms"),
    *("ratio_to_torch", "ratio_to_fused", "ratio_to_unsharded", "collectives", "steps"),
    *("device", "threads", "torch", "timestamp"),
]


def sharded(tensors: Sequence[Tensor], mesh: DeviceMesh) -> list[DTensor]:
    """What each rank has all of, along dimension 0; scalars as fully_shard wants them."""
    return [placed(t.reshape(t.shape or (1,)), mesh, [Shard(0)]) for t in tensors]


def optimizers(work: Workload, mesh: DeviceMesh) -> dict[str, Optimizer]:
    """Over tensors of their own, with gradients."""
    makes: dict[str, Callable[[list[Any]], Optimizer]] = {
        OURS: AdamW_AGC,
        TORCH: AdamW,
        FUSED: partial(AdamW, fused=True),
        UNSHARDED: AdamW_AGC,
    }
    made = {}
    for name, make in makes.items():
        params: list[Any] = [Parameter(p) for p in sharded(work.params, mesh)]
        grads: list[Any] = sharded(work.grads, mesh)
        if name == UNSHARDED:
            params, grads = ([t.to_local().detach() for t in role] for role in (params, grads))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        made[name] = make(params)
    return made


def measure(rank: int, ranks: int, model: str, steps: int, on: str, folder: str) -> None:
    """Milliseconds of each step of each implementation on this rank, to a file."""
    torch.set_num_threads(max(1, cores() // ranks))
    backend = "nccl" if on == "cuda" else "gloo"
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    mesh, device = init_device_mesh(on, (ranks,)), torch.device(on)
    tiny = model == "tiny"
    work = (
        workload_of(model, TINY, device=device) if tiny else random_workload(model, device=device)
    )
    times: list[dict[str, Any]] = []
    with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as collective:
        made = optimizers(work, mesh)
        for turn in range(steps + 2):  # the first two warm up
            for name, optimizer in made.items():
                dist.barrier()
                collective.reset_mock()
                took = step_ms(optimizer, on)
                times.append(
                    {"implementation": name, "turn": turn, "ms": took}
                    | {"collectives": collective.call_count}
                )
    pd.DataFrame(times).to_csv(f"{folder}/{rank}.csv", index=False)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's may outlive the interpreter


def step_ms(optimizer: Optimizer, on: str) -> float:
    """One step, until it is done."""
    start = time.perf_counter()
    optimizer.step()
    if on == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def rows_of(model: str, ranks: int, steps: int, on: str) -> pd.DataFrame:
    """Start the ranks; a row per implementation."""
    with tempfile.TemporaryDirectory() as folder:
        start: Any = mp.start_processes  # type: ignore[attr-defined]  # torch.multiprocessing has no __all__
        given = (ranks, model, steps, on, folder)
        multiprocessing.set_forkserver_preload(["benchmarks.sharded"])  # imported once for all
        start(measure, given, nprocs=ranks, start_method="forkserver")
        found = pd.concat(pd.read_csv(path) for path in Path(folder).glob("*.csv"))
    found = found[found["turn"] >= 2]
    slowest = found.groupby(["implementation", "turn"], sort=False).max().reset_index()
    by_name = slowest.groupby("implementation", sort=False)
    table = pd.DataFrame(quantiles(by_name["ms"], "median_ms", "ms")).reset_index()
    medians = table.set_index("implementation")["median_ms"]
    return table.assign(
        model=model,
        tensors=len(TINY if model == "tiny" else random_workload(model).params),
        ranks=ranks,
        ratio_to_torch=table["median_ms"] / medians[TORCH],
        ratio_to_fused=table["median_ms"] / medians[FUSED],
        ratio_to_unsharded=table["median_ms"] / medians[UNSHARDED],
        collectives=by_name["collectives"].max().to_numpy(),
        steps=steps,
        device=device_name(torch.device(on)),
        threads=max(1, cores() // ranks),
        torch=torch.__version__,
        timestamp=timestamp(),
    )[COLUMNS]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on each number of ranks; print and write every row."""
    parser = parser_of("sharded", __doc__)
    models = ["tiny", *model_names()]
    parser.add_argument("--model", choices=models, default="resnet50", help="default: %(default)s")
    parser.add_argument("--ranks", type=positive, nargs="+", help="default: 1 2 4, on a GPU 1")
    parser.add_argument("--steps", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/sharded.csv"))
    add_device(parser)
    args = parser.parse_args(argv)
    check_file(parser, args.out)
    tables = []
    for ranks in args.ranks or ([1] if args.device == "cuda" else [1, 2, 4]):
        tables.append(rows_of(args.model, ranks, args.steps, args.device))
        write(pd.concat(tables), args.out)
    table = pd.concat(tables)
    shown = table[COLUMNS[: COLUMNS.index("device")]]
    print(shown.to_string(index=False, float_format="{:.3f}".format))
    print(f"on {table['device'].iloc[0]}; every row is in {args.out}")


if __name__ == "__main__":
    main()
