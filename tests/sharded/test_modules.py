"""Modules sharded by torch's own functions train as one process does with the same gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agc_triton import AGC, SGD_AGC, adaptive_clip_grad_
from tests.sharded.test_placements import BACKENDS
from tests.support.optimizers import EACH_WAY, NAMES, build, stateful
from tests.support.ranks import on_ranks, once_on_ranks
from tests.support.recorded import Record, again, recorded
from tests.support.tensors import weight

STEPS = 6
RANKS = 4


class Net(nn.Module):
    """A part that has a parameter of every kind, used or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 8)
        self.norm: nn.Module = nn.LayerNorm(8)
        self.down = nn.Linear(8, 6)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.norm(self.up(x)))) + self.frozen(x)
        return out


def one_dim(net: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=mesh["a", "b"]._flatten("all"))


def hsdp(net: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=mesh)


def offloaded(net: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    fully_shard(net, mesh=mesh["b"], offload_policy=CPUOffloadPolicy(pin_memory=False))


def bf16_compute(net: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(net, mesh=mesh["b"], mp_policy=policy)


def checkpointed(net: Net, mesh: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    net.norm = checkpoint_wrapper(net.norm)
    fully_shard(net, mesh=mesh["b"])


def tensor_parallel(net: Net, mesh: Any) -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {
        "up": ColwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "down": RowwiseParallel(input_layouts=Shard(0)),
    }
    parallelize_module(net, mesh["b"], plan)


def both(net: Net, mesh: Any) -> None:
    """FSDP2 over tensor parallel: strided shards."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
    }
    net.norm = nn.Identity()  # of activations that are sharded
    parallelize_module(net, mesh["b"], plan)
    fully_shard(net, mesh=mesh["a"])


SETUPS: dict[str, Callable[[Net, Any], None]] = {
    "fully_shard": one_dim,
    "HSDP": hsdp,
    "CPU offload": offloaded,
    "bf16 compute": bf16_compute,
    "activation checkpointing": checkpointed,
    "tensor parallel": tensor_parallel,
    "FSDP2 over tensor parallel": both,
}
CASES = [
    *itertools.product(["fully_shard"], EACH_WAY, ["torch"]),
    *itertools.product(list(SETUPS)[1:], ["AdamW"], ["torch"]),
    *itertools.product(["FSDP2 over tensor parallel"], ["AdamW"], BACKENDS[1:]),
]
# In the interpreter these take minutes.
LONG = [case for case in itertools.product(SETUPS, NAMES, BACKENDS) if case not in CASES]


def options(name: str, backend: str) -> dict[str, Any]:
    return {**stateful(name), "lr": 0.05, "clipping": 0.05, "backend": backend}


def losses(net: nn.Module, rank: int) -> list[Callable[[], Tensor]]:
    """Each rank has data of its own."""

    def loss(seed: int) -> Tensor:
        out = net(weight((4, 6), device="cpu", seed=seed))
        whole: Tensor = getattr(out, "full_tensor", lambda: out)()
        return whole.square().mean()

    return [partial(loss, 10 * step + rank) for step in range(STEPS)]


# Beside our own classes: the wrapper, and gradients clipped before any other optimizer.
def wrapped(params: list[Tensor]) -> Callable[[], Any]:
    return AGC(torch.optim.AdamW(params, lr=0.05), clipping=0.05).step


def clipped(params: list[Tensor]) -> Callable[[], Any]:
    base = torch.optim.SGD(params, lr=0.5)

    def step() -> None:
        adaptive_clip_grad_(params, clipping=0.05)
        base.step()

    return step


def accumulated(params: list[Tensor]) -> Callable[[], Any]:
    return SGD_AGC(params, lr=0.5, clipping=0.05).step


OTHERS = {"wrapped": wrapped, "clipped": clipped, "accumulated": accumulated}


def train(cases: list[tuple[str, str, str]], others: list[str], rank: int) -> dict[str, Any]:
    """One after the other."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    records: dict[str, Any] = {}
    for setup, name, backend in cases:
        net = Net()
        SETUPS[setup](net, mesh)
        own = rank // 2 if "tensor parallel" in setup else rank
        optimizer = build(name, net.parameters(), options(name, backend))
        record = recorded(net, losses(net, own), optimizer.step)
        records[str((setup, name, backend))] = tuple(record)
    for label in others:
        net = Net()
        hsdp(net, mesh)
        step = OTHERS[label](list(net.parameters()))
        record = recorded(net, losses(net, rank), step, keep=label == "accumulated")
        records[label] = tuple(record)
    return records


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank has recorded."""
    return once_on_ranks(partial(train, CASES, list(OTHERS)), __name__, tmp_path_factory, RANKS)


def check(record: Record, make: Callable[[list[Tensor]], Callable[[], Any]]) -> None:
    torch.testing.assert_close(record.end, again(record, make), rtol=2e-6, atol=2e-6)
    moved = [not torch.equal(a, b) for a, b in zip(record.start, record.end, strict=True)]
    assert sum(moved) >= 4
    assert not all(moved)  # the unused and the frozen stay


@pytest.mark.parametrize(("setup", "name", "backend"), CASES, ids=str)
def test_equal_to_one_process(ranks: list[Any], setup: str, name: str, backend: str) -> None:
    check_case(ranks, setup, name, backend)


def check_case(ranks: list[Any], setup: str, name: str, backend: str) -> None:
    def make(params: list[Tensor]) -> Callable[[], Any]:
        return build(name, params, options(name, backend)).step

    for each in ranks:
        check(Record(*each[str((setup, name, backend))]), make)


@pytest.mark.soak
def test_every_setup_optimizer_and_path(tmp_path: Path) -> None:
    ranks = on_ranks(partial(train, LONG, []), tmp_path, RANKS)
    for case in LONG:
        check_case(ranks, *case)


@pytest.mark.parametrize("label", OTHERS)
def test_other_ways_to_clip(ranks: list[Any], label: str) -> None:
    for each in ranks:
        check(Record(*each[label]), OTHERS[label])
