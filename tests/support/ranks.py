"""Functions run in other processes, and on several ranks of gloo."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.support.interpreter import interpret_without_gpu
from tests.support.once import once

RANKS = 2
TIMEOUT = timedelta(minutes=2)  # where one rank fails and the others wait for it

# Imported once, by the process that all ranks are forked from.
PRELOAD = ["torch.distributed.fsdp", "examples.train", "examples.train_sharded"]
# What a first step imports: dynamo for its guards, and the interpreter.
PRELOAD += ["torch._dynamo", "triton.runtime.interpreter", "tests.support.ranks"]


def _run(rank: int, work: Callable[[int], Any], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    interpret_without_gpu()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # All is saved; at the interpreter's own exit one of torch's threads may abort it.
    os._exit(0)


def apart(work: Callable[..., Any], *given: Any) -> int | None:
    """The exit status of another process that runs a function of a module."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    process = multiprocessing.get_context("forkserver").Process(target=work, args=given)
    process.start()
    process.join()
    return process.exitcode


def on_ranks(work: Callable[[int], Any], folder: Path, ranks: int = RANKS) -> list[Any]:
    """What a function of a module returns on each rank."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    start: Any = mp.start_processes  # type: ignore[attr-defined]  # torch.multiprocessing has no __all__
    start(_run, (work, str(folder), ranks), nprocs=ranks, start_method="forkserver")
    return _results(folder, ranks)


def once_on_ranks(
    work: Callable[[int], Any], name: str, factory: pytest.TempPathFactory, ranks: int = RANKS
) -> list[Any]:
    """The same for a module's fixture, once for all workers that run its tests."""
    folder = once(lambda folder: on_ranks(work, folder, ranks), name, factory)
    return _results(folder, ranks)


def _results(folder: Path, ranks: int) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def shared(mesh: Any, tensors: Sequence[Tensor]) -> list[Any]:
    """Of tensors that every rank has, DTensors that are sharded along their last dimension."""
    from torch.distributed.tensor import Shard

    from benchmarks.lib.sharding import placed

    return [placed(t, mesh, [Shard(t.dim() - 1)]) for t in tensors]
