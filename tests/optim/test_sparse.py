"""Row-sparse gradients where torch's class takes them: each row that is there is a unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adagrad

from agc_triton import AGC, Adagrad_AGC
from tests.support.checks import clipped, nothing_changes
from tests.support.places import DEVICE
from tests.support.tensors import same, weight

CLIPPING = 0.05


def rows(step: int, shape: tuple[int, ...] = (6, 4)) -> Tensor:
    """A gradient of three rows, one of them twice; the last are under their limits."""
    at = torch.tensor([[4, 4, step]], device=DEVICE)
    values = weight((3, *shape[1:]), device=DEVICE, seed=step) * torch.tensor(
        [[1.0], [1.0], [1e-4]], device=DEVICE
    )
    return torch.sparse_coo_tensor(at, values, shape, check_invariants=True)


def trained(make: Any, scale: float = 1.0) -> list[Any]:
    params = [Parameter(weight(shape, device=DEVICE)) for shape in ((6, 4), (3, 4))]
    optimizer = make(params)
    if scale != 1.0:
        optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
    for step in range(3):
        params[0].grad = rows(step) * scale
        params[1].grad = weight((3, 4), device=DEVICE, seed=step) * scale
        kept = params[0].grad.clone()
        optimizer.step()
        if isinstance(optimizer, Adagrad_AGC):
            assert same(params[0].grad.to_dense(), kept.to_dense())
    return [*(p.detach() for p in params), [dict(optimizer.state[p]) for p in params]]


def test_rows_are_clipped_as_by_the_wrapper() -> None:
    ours = trained(lambda params: Adagrad_AGC(params, lr=0.1, clipping=CLIPPING))
    wrapped = trained(lambda params: AGC(Adagrad(params, lr=0.1), clipping=CLIPPING))
    torch.testing.assert_close(ours, wrapped)
    scaled = trained(lambda params: Adagrad_AGC(params, lr=0.1, clipping=CLIPPING), 256.0)
    torch.testing.assert_close(ours, scaled)


def test_a_row_is_clipped_against_its_own_row_and_grad_stays() -> None:
    params, others = [Parameter(weight((6, 4), device=DEVICE))], [weight((6, 4), device=DEVICE)]
    ours, theirs = Adagrad_AGC(params, clipping=CLIPPING), Adagrad(others)
    for step in range(3):
        params[0].grad = grad = rows(step).coalesce()
        kept = grad.to_dense()
        others[0].grad = clipped(others[0], kept, CLIPPING).to_sparse(1)
        ours.step()
        theirs.step()
        assert same(grad.to_dense(), kept)
    torch.testing.assert_close(params[0].detach(), others[0])
    torch.testing.assert_close(ours.state[params[0]], theirs.state[others[0]])


@pytest.mark.parametrize(
    ("options", "shape", "says"),
    [
        ({"unit_dim": 1}, (6, 4), "unit_dim 0"),
        ({"nonfinite": "skip_unit"}, (6, 4), "looked at for NaN"),
    ],
)
def test_what_cannot_be_clipped_is_refused(
    options: dict[str, Any], shape: tuple[int, ...], says: str
) -> None:
    param = Parameter(weight(shape, device=DEVICE))
    optimizer = Adagrad_AGC([param], **options)
    param.grad = rows(1, shape)
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    param.grad = None
    with nothing_changes([param], optimizer):
        optimizer.step()
