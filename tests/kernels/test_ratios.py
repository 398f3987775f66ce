"""Ratios that the kernels record, of every layout that the planner knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_tile_layouts import LAYOUTS, TRANSPOSED
from tests.support.optimizers import ADAMW, TRITON, build
from tests.support.places import DEVICE
from tests.support.plans import tile_shapes
from tests.support.ratios import check_ratios, latest, ratios_of
from tests.support.tensors import TILE_SHAPES, grads_like, same, unaligned, weight, weights

pytestmark = pytest.mark.usefixtures("poisoned_scratch")


def check(params: list[Tensor], unit_dim: Any = None, name: str = "SGD") -> Any:
    """A step that is tracked and one that is not have the same results, and one has the ratios."""
    options = {"lr": 0.5, **TRITON, "unit_dim": unit_dim}
    expected = [p.clone() for p in params]
    grads = [grad.clone() for grad in grads_like([p.contiguous() for p in params])]
    before = [p.clone() for p in params]
    both = [build(name, own, options) for own in (params, expected)]
    both[0].track_clipping(2)  # type: ignore[attr-defined]  # ours
    for optimizer, own in zip(both, (params, expected), strict=True):
        for p, grad in zip(own, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    assert same(params, expected)
    records = latest(both[0], params)
    for record, p, grad in zip(records, before, grads, strict=True):
        check_ratios(record, ratios_of(p, grad, unit_dim), 1)
    both[0].step()  # not tracked
    assert [record and record.number for record in latest(both[0], params)] == [1] * len(params)
    return both[0]


@pytest.mark.usefixtures("unmerged")
def test_units_in_rows_registers_and_parts() -> None:
    kinds = {(t.rows > 1, t.split) for t in tile_shapes(check(weights(TILE_SHAPES, device=DEVICE)))}
    assert kinds == {(True, False), (False, False), (False, True)}


@pytest.mark.usefixtures("unmerged")
def test_strided_units() -> None:
    params = [
        weight(shape, device=DEVICE, seed=i, unit_dim=1)
        for i, shape in enumerate((TRANSPOSED[1], TRANSPOSED[-1]))
    ]
    assert {t.split for t in tile_shapes(check(params, 1)) if t.strided} == {False, True}


# Two dimensions of units that lie in memory the other way round among them.
@pytest.mark.parametrize("unit_dim", [None, 1, -1, (0, 1), ((0, 2), 1), "tensor"], ids=str)
def test_any_dense_layout(unit_dim: Any) -> None:
    own: list[Callable[[Tensor], Tensor]] = [*LAYOUTS.values(), unaligned]
    check(
        [relaid(weight((4, 3, 2, 5), device=DEVICE, seed=i)) for i, relaid in enumerate(own)],
        unit_dim,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check(weights([(3, 20), (2, 700), (6,)], dtype, DEVICE))


def test_several_launch_groups_of_one_device() -> None:
    kinds = (torch.float32, torch.bfloat16)
    params = [weight((3, 20), kinds[i % 2], DEVICE, seed=i) for i in range(4)]
    check(params, name="AdamW")


def test_weights_under_agc_eps_and_gradients_of_zero() -> None:
    params = [torch.zeros(3, 20, device=DEVICE), weight((2, 12), device=DEVICE)]
    optimizer: Any = build(
        "AdamW", params, {**ADAMW, **TRITON, "agc_eps": 0.5, "track_clipping": 1}
    )
    grads = [weight((3, 20), device=DEVICE, seed=1), torch.zeros(2, 12, device=DEVICE)]
    before = [p.clone() for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.step()
    for record, p, grad in zip(latest(optimizer, params), before, grads, strict=True):
        check_ratios(record, ratios_of(p, grad, agc_eps=0.5), 1)
