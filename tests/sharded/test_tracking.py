"""Ratios of DTensors: each rank records its own units, and ``clip_stats`` gathers them."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton import AGC
from tests.sharded.test_placements import BACKENDS, MESHES
from tests.support.optimizers import build, stateful
from tests.support.ranks import on_ranks, once_on_ranks
from tests.support.ratios import RTOL, latest
from tests.support.tensors import grad_like, weight

OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {},
    "not clipped": {"clipping": 0},
    "another unit_dim": {"unit_dim": 1},
    "differentiable": {"differentiable": True, "foreach": False},
    "wrapped": {},
    "wrapped, not clipped": {"clipping": 0},
}
CASES = [
    *itertools.product(["4"], ["clipped", "another unit_dim", "wrapped"], BACKENDS),
    *itertools.product(["2 x 2"], ["clipped"], BACKENDS),
    *itertools.product(["2 x 2"], ["not clipped", "differentiable", "wrapped"], ["torch"]),
    *itertools.product(["2 x 2"], ["wrapped, not clipped"], ["torch"]),
]
LONG = [
    (mesh, label, backend)
    for mesh, label, backend in itertools.product(["4", "2 x 2"], OPTIONS, BACKENDS)
    if (mesh, label, backend) not in CASES and (label, backend) != ("differentiable", "triton")
]
STEPS = 3
# One that has no gradient in the last step.
WITHOUT = 0


def weights(mesh: str) -> list[Tensor]:
    return [weight(shape, device="cpu", seed=i) for i, (shape, _) in enumerate(MESHES[mesh])]


def trained(params: list[Any], grads: Any, label: str, backend: str) -> Any:
    own = {"clipping": 0.05, "backend": backend, "track_clipping": 1, **OPTIONS[label]}
    if label.startswith("wrapped"):
        optimizer: Any = AGC(torch.optim.SGD(params, lr=0.5), **own)
    else:
        optimizer = build("SGD", params, {**stateful("SGD"), **own})
    for step in range(STEPS):
        for i, (p, grad) in enumerate(zip(params, grads(step), strict=True)):
            p.grad = None if (i, step) == (WITHOUT, STEPS - 1) else grad
        optimizer.step()
    return optimizer


def on_this_rank(cases: list[tuple[str, str, str]], _rank: int) -> dict[str, Any]:
    """One after the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    from benchmarks.lib.sharding import placed

    meshes = {
        "4": init_device_mesh("cpu", (4,)),
        "2 x 2": init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")),
    }

    def distributed(tensors: list[Tensor], mesh: str) -> list[Any]:
        found = []
        for tensor, (_, dims) in zip(tensors, MESHES[mesh], strict=True):
            placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
            found.append(placed(tensor, meshes[mesh], placements))
        return found

    results = {}
    for mesh, label, backend in cases:

        def grads(step: int, mesh: str = mesh) -> list[Any]:
            own = [grad_like(w, 100 * step + i) for i, w in enumerate(weights(mesh))]
            return distributed(own, mesh)

        params = distributed(weights(mesh), mesh)
        optimizer = trained(params, grads, label, backend)
        results[str((mesh, label, backend))] = {
            "gathered": optimizer.clip_stats(gather=True).to_dict("list"),
            "log": optimizer.clip_log(gather=True),
            "own": optimizer.clip_stats().to_dict("list"),
            "largest": [None if r is None else r.ratios.numel() for r in latest(optimizer, params)],
        }
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ends with."""
    return once_on_ranks(partial(on_this_rank, CASES), __name__, tmp_path_factory, 4)


@pytest.mark.parametrize(("mesh", "label", "backend"), CASES, ids=str)
def test_gathered_as_of_one_process(ranks: list[Any], mesh: str, label: str, backend: str) -> None:
    check_case(ranks, mesh, label, backend)


@pytest.mark.soak
def test_all_options_on_every_mesh(tmp_path: Path) -> None:
    ranks = on_ranks(partial(on_this_rank, LONG), tmp_path, 4)
    for case in LONG:
        check_case(ranks, *case)


def check_case(ranks: list[Any], mesh: str, label: str, backend: str) -> None:
    def grads(step: int) -> list[Tensor]:
        return [grad_like(w, 100 * step + i) for i, w in enumerate(weights(mesh))]

    alone = trained(weights(mesh), grads, label, backend)
    expected = alone.clip_stats().to_dict("list")
    assert expected["step"][WITHOUT] == STEPS - 1
    for each in ranks:
        found = each[str((mesh, label, backend))]
        for key, values in expected.items():
            if key.startswith("ratio") or key in ("removed", "clipping"):
                pair = torch.tensor(found["gathered"][key]), torch.tensor(values)
                torch.testing.assert_close(*pair, rtol=RTOL, atol=1e-6, equal_nan=True)
            else:
                assert found["gathered"][key] == values, key
        numbers = {key: values[-1] for key, values in expected.items()}
        assert found["log"] == pytest.approx({key: numbers[key] for key in found["log"]}, rel=RTOL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_rank_has_its_own_units(ranks: list[Any], backend: str) -> None:
    own = [each[str(("4", "clipped", backend))]["own"]["units"] for each in ranks]
    # Whole units, a part of every unit, and shapes of which nothing lies on the last rank.
    assert [units[0] for units in own] == [1, 1, 1, 1]
    assert [units[1] for units in own] == [2, 2, 2, 2]
    assert [units[3] for units in own] == [1, 1, 1, 0]
    assert [units[5] for units in own] == [1, 1, 1, 0]
