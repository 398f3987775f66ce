"""Unit classes of the kernels: every tile shape and boundary, alignment, layouts and dtypes.

Every tensor lies between guard bands, and scratch memory is poisoned.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import agc_triton.triton_path.buckets
import agc_triton.triton_path.tiles
from agc_triton import adaptive_clip_grad_
from agc_triton.triton_path.buckets import ideal_shape
from tests.support.checks import check_clipped
from tests.support.guards import Guarded, GuardedRun
from tests.support.optimizers import ADAMW, CLIPPING, STATEFUL
from tests.support.places import DEVICE
from tests.support.plans import bucket_plans, tile_shapes, units_of
from tests.support.soak import soaked
from tests.support.tensors import assign, grads_like, weight, weights

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

SGD = {"lr": 0.5, "weight_decay": 0.1}


def boundaries(dtype: torch.dtype, states: int) -> list[int]:
    """Each greatest length of a unit that a tile shape holds."""
    lengths, shape = [], ideal_shape(units_of(1, False), dtype.itemsize, states)
    while not shape.split:
        length = shape.capacity
        lengths.append(length)
        shape = ideal_shape(units_of(length + 1, False), dtype.itemsize, states)
    return lengths


def around(dtype: torch.dtype, every: int) -> list[Any]:
    """Boundaries with one state; but for every so many, and the last, in the long run only."""
    found = boundaries(dtype, 1)
    quick = {*found[::every], found[-1]}
    return soaked([(dtype, length) for length in found], lambda dtype, length: length in quick)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize(
    ("dtype", "length"),
    [*around(torch.float32, 1), *around(torch.bfloat16, 4), *around(torch.float64, 4)],
    ids=str,
)
def test_both_sides_of_every_boundary(dtype: torch.dtype, length: int) -> None:
    shapes = [(1, length - 1), (1, length), (2, length + 1)]
    run = GuardedRun("SGD", weights(shapes, dtype, DEVICE), STATEFUL["SGD"])
    run.step()
    expected = [ideal_shape(units_of(n), dtype.itemsize, 1) for _, n in shapes]
    assert tile_shapes(run.optimizer) == set(expected)
    assert expected[1] != expected[2]


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("length", [n for n in boundaries(torch.float32, 3) if n >= 128])
def test_boundaries_with_three_states(length: int) -> None:
    lengths = (length, length + 1)
    params = weights([(2, n) for n in lengths], device=DEVICE)
    run = GuardedRun("RMSprop", params, STATEFUL["RMSprop"])
    run.step()
    expected = {ideal_shape(units_of(n), 4, 3) for n in lengths}
    assert tile_shapes(run.optimizer) == expected
    assert len(expected) == 2


LENGTHS = (3, 128, 129, 644, 20480, 20481)
TWO_UNITS = [(2, n) for n in LENGTHS]


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize(("name", "options"), [("SGD", SGD), ("AdamW", ADAMW)])
def test_no_state_and_two_states(name: str, options: dict[str, Any]) -> None:
    run = GuardedRun(name, weights(TWO_UNITS, device=DEVICE), options)
    run.step()
    assert tile_shapes(run.optimizer) == {ideal_shape(units_of(n), 4, 2) for n in LENGTHS}


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_alone(dtype: torch.dtype) -> None:
    params = [Guarded(w) for w in weights(TWO_UNITS, dtype, DEVICE)]
    kept = [p.tensor.clone() for p in params]
    grads = grads_like(kept)
    guarded = [Guarded(g) for g in grads]
    assign([p.tensor for p in params], [g.tensor for g in guarded])
    adaptive_clip_grad_([p.tensor for p in params], clipping=CLIPPING, backend="triton")
    for p, g, before, grad in zip(params, guarded, kept, grads, strict=True):
        p.assert_intact()
        g.assert_intact()
        assert torch.equal(p.tensor, before)
        assert p.tensor.grad is g.tensor
        check_clipped(before, grad, g.tensor)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("role", ["param", "grad", "state"])
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, 2), (torch.bfloat16, 1)],
    ids=str,
)
def test_one_unaligned_address_is_enough(dtype: torch.dtype, offset: int, role: str) -> None:
    lengths = (96, 1024, 20496)
    params = weights([(2, n) for n in lengths], dtype, DEVICE)
    run = GuardedRun("SGD", params, STATEFUL["SGD"], {role: offset})
    run.step()
    assert {shape.vector for shape in tile_shapes(run.optimizer)} == {1}


@pytest.mark.usefixtures("unmerged")
def test_a_multiple_of_16_bytes_is_aligned() -> None:
    params = weights([(2, n) for n in (96, 1024, 20496)], device=DEVICE)
    run = GuardedRun("SGD", params, STATEFUL["SGD"], {"param": 4, "grad": 8, "state": 12})
    run.step()
    assert {shape.vector for shape in tile_shapes(run.optimizer)} == {4}


@pytest.mark.parametrize("shape", [(), (1,), (300,), (300, 1, 1, 1), (1, 5), (30_000,)], ids=str)
def test_a_whole_tensor_as_one_unit(shape: tuple[int, ...]) -> None:
    run = GuardedRun(
        "SGD", [weight(shape, device=DEVICE, unit_dim=1)], {**STATEFUL["SGD"], "unit_dim": 1}
    )
    run.step()
    (bucket,) = bucket_plans(run.optimizer)[0].buckets
    assert bucket.units == 1


def test_one_long_unit() -> None:
    # A vision transformer's position embedding.
    run = GuardedRun("SGD", [weight((1, 197, 1024), device=DEVICE)], SGD)
    run.step()
    (plan,) = bucket_plans(run.optimizer)
    assert plan.sums == 25


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_parts_longer_than_a_tile(
    dtype: torch.dtype, unit_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agc_triton.triton_path.tiles, "MAX_PARTS", 2)
    shape = (2, 40_001) if unit_dim == 0 else (40_001, 2)
    options = {**SGD, "unit_dim": unit_dim}
    run = GuardedRun("SGD", weights([shape], dtype, DEVICE, unit_dim=unit_dim), options)
    run.step()
    (plan,) = bucket_plans(run.optimizer)
    (bucket,) = plan.buckets
    assert len(plan.parts) == plan.sums == 2 * 2
    assert len(bucket.tiles) > len(plan.parts)


MIXTURE = ((4, 24), (3, 27), (5,), (2, 700), (2, 1030), (2, 20501))


@pytest.mark.parametrize("buckets", [1, 4])
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_merged_classes(unit_dim: int, buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agc_triton.triton_path.buckets, "MAX_BUCKETS", buckets)
    shapes = MIXTURE if unit_dim == 0 else [shape[::-1] for shape in MIXTURE]
    params = weights(shapes, device=DEVICE, unit_dim=unit_dim)
    run = GuardedRun("SGD", params, {**STATEFUL["SGD"], "unit_dim": unit_dim})
    run.step()
    assert len(bucket_plans(run.optimizer)[0].buckets) <= buckets
