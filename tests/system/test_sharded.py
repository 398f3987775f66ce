"""DTensors step as what they stand for: local tensors, one all-reduce for units that are split."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support.optimizers import NAMES, build, stateful
from tests.support.ranks import RANKS, on_ranks
from tests.support.tensors import grad_like, weight

STEPS = 6
MODES: list[dict[str, Any]] = [{}, {"foreach": True}, {"clipping": 0}, {"unit_dim": 1}]

# Shapes and the dimension each is sharded along; None where every rank has all of it.
SHARDED: list[tuple[tuple[int, ...], int | None]] = [
    ((4, 6), 0),
    ((4, 6), 1),  # row-wise: every rank holds a part of every unit
    ((3, 6), 0),  # uneven
    ((1, 6), 0),  # nothing on the last rank
    ((6, 4, 3, 3), 0),
    ((5,), 0),
    ((4, 1, 1, 1), 0),
    ((3, 5), None),
    ((7,), None),
]
CASES = [
    *itertools.product(NAMES, [0], ["torch", "triton"]),
    *itertools.product(["AdamW"], [1, 2, 3], ["torch"]),
    *itertools.product(["AdamW"], [2, 3], ["triton"]),
]


def weights() -> list[Tensor]:
    return [
        weight(shape, torch.float64, device="cpu", seed=i) for i, (shape, _) in enumerate(SHARDED)
    ]


def grads(step: int) -> list[Tensor]:
    return [grad_like(w, 100 * step + i) for i, w in enumerate(weights())]


def options(name: str, mode: int, backend: str) -> dict[str, Any]:
    return {**stateful(name), "clipping": 0.05, **MODES[mode], "backend": backend}


def sharded(rank: int) -> dict[str, Any]:
    """All cases, one after the other, on this rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))

    def distributed(tensors: list[Tensor]) -> list[Tensor]:
        return [
            distribute_tensor(t, mesh, [Replicate() if dim is None else Shard(dim)])
            for t, (_, dim) in zip(tensors, SHARDED, strict=True)
        ]

    results: dict[str, dict[str, Any]] = {}
    for case in CASES:
        params: list[Any] = distributed(weights())
        optimizer = build(case[0], params, options(*case))
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as collective:
            for step in range(STEPS):
                given = distributed(grads(step))
                for i, (p, g) in enumerate(zip(params, given, strict=True)):
                    p.grad = None if step == 1 and i == 5 else g
                optimizer.step()
            calls = collective.call_count
            waiting = [not call.kwargs["async_op"] for call in collective.call_args_list]
        plan = optimizer._paths.triton.plan  # type: ignore[attr-defined]  # ours
        launched = sum(len(part.entries) for part in plan.parts) if plan else 0
        states = [
            [x.full_tensor() for k, x in optimizer.state[p].items() if k != "step"] for p in params
        ]
        results[str(case)] = {"values": [p.full_tensor() for p in params], "states": states}
        results[str(case)] |= {"waiting": any(waiting), "versions": [p._version for p in params]}
        results[str(case)] |= {"calls": calls, "launched": launched}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ends with."""
    return on_ranks(sharded, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "mode", "backend"), CASES, ids=str)
def test_equal_to_one_process(ranks: list[Any], name: str, mode: int, backend: str) -> None:
    params = weights()
    optimizer = build(name, params, options(name, mode, backend))
    for step in range(STEPS):
        for i, (p, g) in enumerate(zip(params, grads(step), strict=True)):
            p.grad = None if step == 1 and i == 5 else g
        optimizer.step()
    states = [[x for k, x in optimizer.state[p].items() if k != "step"] for p in params]
    for each in ranks:
        found = each[str((name, mode, backend))]
        # In fp64, as RMSprop's centered variances cancel; sums over ranks have another order.
        torch.testing.assert_close(found["values"], params, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["states"], states, rtol=1e-9, atol=1e-9)
        # One collective a step for all split units; none where nothing is clipped.
        assert found["calls"] == (STEPS if MODES[mode].get("clipping", 1) else 0)
        assert not found["waiting"]
        assert all(version >= STEPS - 1 for version in found["versions"])  # autograd is told
        assert bool(found["launched"]) == (backend == "triton")


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3, bias=False)
    )


def train(net: Any) -> list[Tensor]:
    """Three steps on the same data on every rank."""
    from agc_triton import AdamW_AGC

    optimizer = AdamW_AGC(net.parameters(), lr=0.1, clipping=0.05, backend="torch")
    for step in range(3):
        loss = net(weight((4, 6), device="cpu", seed=step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [getattr(p, "full_tensor", p.detach)() for p in net.parameters()]


def fully_sharded(_rank: int) -> list[list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    results = []
    for shape in ((RANKS,), (1, RANKS), (RANKS, 1)):
        names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
        net = model()
        fully_shard(net, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        results.append(train(net))
    return results


def test_fully_shard_in_one_and_two_dimensions(tmp_path: Path) -> None:
    expected = train(model())
    for rank in on_ranks(fully_sharded, tmp_path):
        for found in rank:
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_a_partial_gradient_is_refused_by_name(tmp_path: Path) -> None:
    for errors in on_ranks(partial_gradient, tmp_path):
        assert len(errors) == 4
        for error in errors:
            assert "parameter 0 of group 0" in error
            assert "Partial" in error
            assert "redistribute" in error


def partial_gradient(_rank: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    from agc_triton import SGD_AGC

    mesh = init_device_mesh("cpu", (RANKS,))
    errors = []
    for backend, steps_before in itertools.product(("torch", "triton"), (0, 1)):
        param: Any = DTensor.from_local(torch.ones(2, 3), mesh, [Replicate()])
        optimizer = SGD_AGC([param], lr=0.1, backend=backend)
        for _ in range(steps_before):  # a plan is there
            param.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Replicate()])
            optimizer.step()
        param.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Partial()])
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))
    return errors
