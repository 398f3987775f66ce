"""DTensors step as what they stand for, however placed, with few launches and collectives."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support.optimizers import NAMES, build, stateful
from tests.support.places import DEVICE
from tests.support.ranks import on_ranks, once_on_ranks
from tests.support.tensors import grad_like, weight

STEPS = 4
MODES: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"clipping": 0},
    {"unit_dim": 1},
    {"unit_dim": "tensor"},
    {"unit_dim": (0, 1)},
]

# Shapes, and along which dimension of a mesh which of theirs is sharded; None where it is not.
Placed = tuple[tuple[int, ...], tuple[int | None, ...]]
ONE_DIM: list[Placed] = [
    ((4, 3, 2), (0,)),
    ((2, 1, 4), (2,)),
    ((2, 3, 2), (1,)),  # row-wise: every rank holds a part of every unit
    ((3, 6), (0,)),  # uneven, and nothing on the last of four ranks
    ((1, 6), (0,)),
    ((5,), (0,)),
    ((4, 1, 1, 1), (0,)),
    ((2, 5), (None,)),
]
TWO_DIMS: list[Placed] = [
    ((4, 6), (None, 0)),  # HSDP
    ((2, 6), (None, 1)),
    ((4, 6), (0, 1)),
    ((2, 5), (1, 1)),  # added up over both
    ((7,), (0, 0)),
    ((7,), (None, 0)),
    ((5, 3), (0, 0)),
]
# What is distributed over how many ranks of a mesh of two by two.
MESHES: dict[str, list[Placed]] = {"2": ONE_DIM, "4": ONE_DIM, "2 x 2": TWO_DIMS}
# The ranks' parameters are on the CPU, which the kernels take in the interpreter only.
BACKENDS = ["torch", "triton"] if DEVICE == "cpu" else ["torch"]
CASES = [
    *itertools.product(["2"], NAMES, [0], ["torch"]),
    *itertools.product(["2"], ["NAdam"], [0], BACKENDS[1:]),
    *itertools.product(["4"], ["SGD", "AdamW"], [0], BACKENDS),
    *itertools.product(["2 x 2"], ["AdamW"], [0], BACKENDS),
    *itertools.product(["2 x 2"], ["RMSprop"], [0], ["torch"]),
    *itertools.product(["4"], ["AdamW"], [1, 2, 3, 4], ["torch"]),
    *itertools.product(["4"], ["SGD"], [5], BACKENDS),
]
# In the interpreter these take minutes.
LONG = [case for case in itertools.product(MESHES, NAMES, [0], BACKENDS) if case not in CASES]


def chosen(mesh: str, mode: int) -> list[Placed]:
    """Two dimensions of units leave none to shapes of two."""
    pairs = isinstance(MODES[mode].get("unit_dim"), tuple)
    return [placed for placed in MESHES[mesh] if not pairs or len(placed[0]) == 3]


def weights(mesh: str, mode: int) -> list[Tensor]:
    return [weight(s, device="cpu", seed=i) for i, (s, _) in enumerate(chosen(mesh, mode))]


def grads(mesh: str, mode: int, step: int) -> list[Tensor]:
    return [grad_like(w, 100 * step + i) for i, w in enumerate(weights(mesh, mode))]


def options(name: str, mode: int, backend: str) -> dict[str, Any]:
    return {**stateful(name), "clipping": 0.05, **MODES[mode], "backend": backend}


def without_grad(step: int, i: int) -> bool:
    return step == 1 and i == 5


def on_this_rank(cases: list[tuple[str, str, int, str]], rank: int) -> dict[str, Any]:
    """All cases, one after the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    from benchmarks.lib.sharding import placed

    two_by_two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    meshes = {"2": two_by_two["b"], "4": init_device_mesh("cpu", (4,)), "2 x 2": two_by_two}

    def distributed(tensors: list[Tensor], mesh: str, mode: int) -> list[Tensor]:
        found: list[Tensor] = []
        for tensor, (_, dims) in zip(tensors, chosen(mesh, mode), strict=True):
            placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
            found.append(placed(tensor, meshes[mesh], placements))
        return found

    here = [case for case in cases if rank < 2 or case[0] != "2"]
    return {str(case): step_case(case, distributed) for case in here}


def step_case(case: tuple[str, str, int, str], distributed: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from agc_triton.triton_path.launches import Launch

    mesh, name, mode, backend = case
    params = distributed(weights(mesh, mode), mesh, mode)
    optimizer: Any = build(name, params, options(name, mode, backend))
    launched = mock.patch.object(Launch, "fire", autospec=True, side_effect=Launch.fire)
    collective = mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce)
    plans = set()
    with collective as collectives, launched as launches:
        for step in range(STEPS):
            given = distributed(grads(mesh, mode, step), mesh, mode)
            for i, (p, g) in enumerate(zip(params, given, strict=True)):
                p.grad = None if without_grad(step, i) else g
            optimizer.step()
            if step:  # what is empty on a rank gets its states after the first plan
                plans.add(id(optimizer._paths.triton.plan))
        return {
            "values": [p.full_tensor() for p in params],
            "states": [states_of(optimizer.state[p]) for p in params],
            "steps": [float(optimizer.state[p].get("step", STEPS)) for p in params],
            "collectives": collectives.call_count,
            "waiting": any(not c.kwargs["async_op"] for c in collectives.call_args_list),
            "launches": launches.call_count,
            "plans": len(plans),
            "versions": [p._version for p in params],
        }


def states_of(entry: dict[str, Any]) -> list[Tensor]:
    """In full, where they are DTensors."""
    tensors = [getattr(x, "full_tensor", lambda x=x: x)() for k, x in entry.items() if k != "step"]
    return [t for t in tensors if isinstance(t, Tensor)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ends with."""
    return once_on_ranks(partial(on_this_rank, CASES), __name__, tmp_path_factory, 4)


@pytest.mark.parametrize(("mesh", "name", "mode", "backend"), CASES, ids=str)
def test_equal_to_one_process(
    ranks: list[Any], mesh: str, name: str, mode: int, backend: str
) -> None:
    check_case(ranks, mesh, name, mode, backend)


@pytest.mark.soak
def test_every_optimizer_and_path_on_every_mesh(tmp_path: Path) -> None:
    ranks = on_ranks(partial(on_this_rank, LONG), tmp_path, 4)
    for case in LONG:
        check_case(ranks, *case)


def check_case(ranks: list[Any], mesh: str, name: str, mode: int, backend: str) -> None:
    params = weights(mesh, mode)
    optimizer = build(name, params, options(name, mode, backend))
    for step in range(STEPS):
        for i, (p, g) in enumerate(zip(params, grads(mesh, mode, step), strict=True)):
            p.grad = None if without_grad(step, i) else g
        optimizer.step()
    states = [states_of(optimizer.state[p]) for p in params]
    steps = [float(optimizer.state[p].get("step", STEPS)) for p in params]
    split_over = {"2": 1, "4": 1, "2 x 2": 2}[mesh]
    for each in ranks[:2] if mesh == "2" else ranks:
        found = each[str((mesh, name, mode, backend))]
        torch.testing.assert_close(found["values"], params, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found["states"], states, rtol=2e-6, atol=2e-6)
        assert found["steps"] == steps
        # One collective per process group and step; none where nothing is clipped.
        clipped = bool(MODES[mode].get("clipping", 1))
        assert found["collectives"] == (STEPS * split_over if clipped else 0)
        assert not found["waiting"]
        assert all(version >= STEPS - 1 for version in found["versions"])  # autograd is told
        assert found["plans"] == 1
        assert found["launches"] <= 8 * STEPS
        assert bool(found["launches"]) == (backend == "triton")
