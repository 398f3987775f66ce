"""unitwise_norm: one value per unit, in fp32 or more."""

from __future__ import annotations

import math

import pytest
import torch

from agc_triton import unitwise_norm


@pytest.mark.parametrize("unit_dim", [None, 0, 1, 2, -1, -3])
def test_unitwise_norm_has_one_value_per_unit(unit_dim: int | None) -> None:
    tensor = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    norms = unitwise_norm(tensor, unit_dim)
    dim = (unit_dim or 0) % 3
    assert norms.shape == tuple(n if d == dim else 1 for d, n in enumerate(tensor.shape))
    rows = torch.stack([torch.linalg.norm(row) for row in tensor.unbind(dim)])
    torch.testing.assert_close(norms.flatten(), rows)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (7, 1, 1, 1), (1, 1, 7)], ids=str)
def test_unitwise_norm_of_a_tensor_of_squeezed_rank_one_is_a_single_value(
    shape: tuple[int, ...],
) -> None:
    norms = unitwise_norm(torch.full(shape, -2.0), unit_dim=5)
    assert norms.shape == (1,) * len(shape)
    assert norms.item() == pytest.approx(2 * math.sqrt(math.prod(shape)))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (2, 300)], ids=str)
def test_unitwise_norm_accumulates_in_fp32_or_more(
    shape: tuple[int, ...], dtype: torch.dtype, expected: torch.dtype
) -> None:
    norms = unitwise_norm(torch.full(shape, 300.0, dtype=dtype))
    assert norms.dtype == expected
    width = math.prod(shape[1:])
    torch.testing.assert_close(
        norms.double(), torch.full_like(norms, 300 * math.sqrt(width)).double()
    )
