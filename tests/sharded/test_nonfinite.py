"""``nonfinite`` with parameters that two ranks share: one rank's part of the gradient holds NaN."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sharded.test_placements import BACKENDS
from tests.support.formulas import SCALARS
from tests.support.optimizers import EACH_WAY, NAMES, STATEFUL, build
from tests.support.ranks import RANKS, on_ranks, once_on_ranks
from tests.support.tensors import same, weight

# Along the units, and across them: then both ranks hold a part of the unit with the NaN.
SHARDED = (0, 1)
CASES = [
    *itertools.product(EACH_WAY, ("raise", "skip_unit"), SHARDED, BACKENDS[:1]),
    *itertools.product(["SGD"], ("raise", "skip_unit"), SHARDED, BACKENDS[1:]),
]
LONG = [
    case
    for case in itertools.product(NAMES, ("raise", "skip_unit"), SHARDED, BACKENDS)
    if case not in CASES
]


def start() -> tuple[Tensor, Tensor]:
    """A weight, and a gradient whose last element, on the last rank only, is NaN."""
    param, grad = (weight((4, 6), torch.float64, seed=seed) for seed in range(2))
    grad[3, 5] = torch.nan
    return param, grad


def options(name: str, nonfinite: str, backend: str) -> dict[str, Any]:
    own = {"clipping": 0.05, "nonfinite": nonfinite, "backend": backend}
    return {**STATEFUL[name], **own}


def cases(nonfinite: str) -> pytest.MarkDecorator:
    """Of these, all but what ``nonfinite`` does."""
    found = [(name, dim, backend) for name, own, dim, backend in CASES if own == nonfinite]
    return pytest.mark.parametrize(("name", "dim", "backend"), found)


def step(cases: list[tuple[str, str, int, str]], rank: int) -> dict[str, Any]:
    """One after the other, on this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    results = {}
    for case in cases:
        name, nonfinite, dim, backend = case
        param, grad = (distribute_tensor(t, mesh, [Shard(dim)]) for t in start())
        assert bool(grad.to_local().isnan().any()) is (rank == RANKS - 1)
        param.grad = grad
        optimizer: Any = build(name, [param], options(name, nonfinite, backend))
        error = ""
        try:
            optimizer.step()
        except RuntimeError as raised:
            error = str(raised)
        states = [x.full_tensor() for k, x in optimizer.state[param].items() if k not in SCALARS]
        values = [param.full_tensor(), *states]
        results[str(case)] = {"error": error, "values": values, "skipped": optimizer.skipped_units}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ends with."""
    return once_on_ranks(partial(step, CASES), __name__, tmp_path_factory)


@cases("raise")
def test_nan_on_one_rank_raises_on_both(
    ranks: list[Any], name: str, dim: int, backend: str
) -> None:
    check_raise(ranks, name, dim, backend)


def check_raise(ranks: list[Any], name: str, dim: int, backend: str) -> None:
    param, _ = start()
    new = build(name, [param], options(name, "raise", backend))
    before = [param, *(x for k, x in new.state[param].items() if k not in SCALARS)]
    for result in (each[str((name, "raise", dim, backend))] for each in ranks):
        assert "parameter 0 of group 0" in result["error"]
        assert f"NaN on rank {RANKS - 1}" in result["error"]
        assert same(result["values"], before)


@cases("skip_unit")
def test_a_unit_is_skipped_on_both_ranks(
    ranks: list[Any], name: str, dim: int, backend: str
) -> None:
    check_skip_unit(ranks, name, dim, backend)


def check_skip_unit(ranks: list[Any], name: str, dim: int, backend: str) -> None:
    param, grad = start()
    param.grad = grad
    optimizer: Any = build(name, [param], options(name, "skip_unit", backend))
    optimizer.step()
    expected = [param, *(x for k, x in optimizer.state[param].items() if k not in SCALARS)]
    first, second = (each[str((name, "skip_unit", dim, backend))] for each in ranks)
    assert same(first["values"], second["values"])
    assert first["error"] == second["error"] == ""
    # Of rows the last rank alone holds the one with NaN, of columns each holds a part of it.
    assert [first["skipped"], second["skipped"]] == [dim, 1]
    assert torch.equal(first["values"][0][3], start()[0][3])
    # Where ranks hold parts of a unit its squares are added up in another order.
    torch.testing.assert_close(first["values"], expected, rtol=1e-12, atol=0)


@pytest.mark.soak
def test_every_optimizer_on_both_paths(tmp_path: Path) -> None:
    ranks = on_ranks(partial(step, LONG), tmp_path)
    for name, nonfinite, dim, backend in LONG:
        check = {"raise": check_raise, "skip_unit": check_skip_unit}[nonfinite]
        check(ranks, name, dim, backend)
