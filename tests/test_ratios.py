"""``adaptive_clip_grad_(..., ratios=)`` and the wrapper's sparse gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agc_triton import AGC, adaptive_clip_grad_, unitwise_norm
from tests.support.optimizers import build
from tests.support.places import DEVICE
from tests.support.ratios import RTOL, check_ratios, latest, ratios_of
from tests.support.tensors import assign, grads_like, in_order, same, weight, weights


def clipped_with_ratios(params: list[Tensor], **options: Any) -> list[Any]:
    ratios: list[Tensor | None] = [torch.ones(1)]  # what was there goes
    adaptive_clip_grad_(params, ratios=ratios, **options)
    return ratios


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("clipping", [0.05, 0, None])
@pytest.mark.parametrize("unit_dim", [None, "tensor"], ids=str)
def test_a_list_is_filled(backend: str, clipping: float | None, unit_dim: Any) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    params = weights(device=device)
    others = [p.clone() for p in params]
    grads: list[Tensor | None] = [*grads_like(params)]
    grads[1] = None
    for own in (params, others):
        assign(own, [g if g is None else g.clone() for g in grads])
    options = {"clipping": clipping, "backend": backend, "unit_dim": unit_dim}
    ratios = clipped_with_ratios(params, **options)
    adaptive_clip_grad_(others, **options)
    assert same([p.grad for p in params], [p.grad for p in others])
    for found, p, grad in zip(ratios, params, grads, strict=True):
        if grad is None:
            assert found is None
            continue
        assert (found.shape, found.dtype) == (unitwise_norm(p, unit_dim).shape, torch.float32)
        assert found.device == p.device
        expected = ratios_of(p, grad, unit_dim)
        np.testing.assert_allclose(found.flatten().cpu(), expected, rtol=RTOL)


# Their norms have a value per index of a dimension that is cut into parts.
@pytest.mark.parametrize("unit_dim", [((0, 2), 1), (0, 2), 1, -1], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=str)
def test_shaped_as_norms(unit_dim: Any, order: tuple[int, ...]) -> None:
    param = in_order(weight((4, 3, 5), device=DEVICE), order)
    (param.grad,) = grads_like([param])
    expected = unitwise_norm(param.grad, unit_dim) / unitwise_norm(param, unit_dim)
    (ratios,) = clipped_with_ratios([param], unit_dim=unit_dim, clipping=0.05)
    torch.testing.assert_close(ratios, expected, rtol=RTOL, atol=0)


def test_ratios_that_were_given_stay() -> None:
    params = weights(device=DEVICE)
    found = []
    for seed in range(2):
        assign(params, grads_like(params, seed))
        expected = [ratios_of(p, p.grad) for p in params]  # type: ignore[arg-type]  # there is one
        found.append((clipped_with_ratios(params), expected))
        adaptive_clip_grad_(params)
    for ratios, expected in found:
        for own, of_param in zip(ratios, expected, strict=True):
            np.testing.assert_allclose(own.flatten().cpu(), of_param, rtol=RTOL)


def test_what_is_no_list() -> None:
    params = weights()
    assign(params, grads_like(params))
    before = [p.grad.clone() for p in params]  # type: ignore[union-attr]  # there is one
    with pytest.raises(TypeError, match="ratios must be a list to fill, not tuple"):
        adaptive_clip_grad_(params, ratios=())  # type: ignore[arg-type]  # that is the point
    assert same([p.grad for p in params], before)


def test_what_has_no_units_has_no_ratios() -> None:
    param = weight((3, 4), device=DEVICE)
    (param.grad,) = grads_like([param])
    assert clipped_with_ratios([param], clipping=0, unit_dim=5) == [None]


@pytest.mark.parametrize("unit_dim", [0, "tensor"])
@pytest.mark.parametrize("kind", ["wrapped", "Adagrad"])
def test_rows_of_sparse_gradients(kind: str, unit_dim: Any) -> None:
    table, dense = weight((6, 4), device=DEVICE), weight((2, 3), device=DEVICE, seed=1)
    own = {"unit_dim": unit_dim, "track_clipping": 1, "backend": "torch"}
    if kind == "wrapped":
        optimizer: Any = AGC(torch.optim.SGD([table, dense], lr=0.1), **own)
    else:
        optimizer = build(kind, [table, dense], own)
    values = weight((3, 4), device=DEVICE, seed=2)
    rows = torch.tensor([[4, 1, 4]], device=DEVICE)
    table.grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=True)
    (dense.grad,) = grads_like([dense])
    full, of_dense = table.grad.to_dense(), dense.grad.clone()
    before = table.clone(), dense.clone()
    optimizer.step()
    expected = ratios_of(before[0], full, unit_dim)
    if unit_dim == 0:
        expected[[0, 2, 3, 5]] = np.nan  # rows that are not there
    records = latest(optimizer, [table, dense])
    check_ratios(records[0], expected, 1)
    check_ratios(records[1], ratios_of(before[1], of_dense, unit_dim), 1)


def test_sparse_gradients_of_groups_without_clipping_are_left_out() -> None:
    table = weight((6, 4), device=DEVICE)
    optimizer: Any = build("Adagrad", [table], {"clipping": 0, "track_clipping": 1})
    table.grad = weight((6, 4), device=DEVICE, seed=1).to_sparse(1)
    optimizer.step()
    assert latest(optimizer, [table]) == [None]
