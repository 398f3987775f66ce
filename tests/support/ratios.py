"""The float64 oracle of what tracked steps record, and what they have recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agc_triton.records import Latest
from tests.support.rounded import Array, as_float64

# Ratios are fp32, of norms that are fp32 too.
RTOL = 1e-5


def unit_of(shape: Sequence[int], unit_dim: Any = None) -> Any:
    """The number of each element's unit, counted along ascending dimensions."""
    numbers = np.zeros(tuple(shape), np.int64)
    if unit_dim == "tensor" or sum(size != 1 for size in shape) <= 1:
        return numbers
    dims = unit_dim if isinstance(unit_dim, tuple) else (unit_dim or 0,)
    named = [dim if isinstance(dim, tuple) else (dim, None) for dim in dims]
    for dim, parts in sorted((dim % len(shape), parts) for dim, parts in named):
        parts = parts or shape[dim]
        along = np.arange(shape[dim]) // max(shape[dim] // parts, 1)
        across = [-1 if d == dim else 1 for d in range(len(shape))]
        numbers = numbers * parts + along.reshape(across)
    return numbers


def ratios_of(weight: Tensor, grad: Tensor, unit_dim: Any = None, agc_eps: float = 1e-3) -> Array:
    """||g|| / max(||w||, agc_eps) of each unit."""
    unit = unit_of(weight.shape, unit_dim).reshape(-1)
    norms = []
    for tensor in (weight, grad):
        squares = np.square(as_float64(tensor)).reshape(len(unit), -1).sum(1)
        norms.append(np.sqrt(np.bincount(unit, squares)))
    found: Array = norms[1] / np.maximum(norms[0], agc_eps)
    return found


def latest(optimizer: Any, params: Sequence[Tensor]) -> list[Latest | None]:
    """What was recorded last of each parameter."""
    return list(optimizer._recorder.records.latest(params))


def check_ratios(found: Latest | None, expected: Array, number: int) -> None:
    """What is recorded of one parameter is of this step, and as expected."""
    assert found is not None
    assert found.number == number
    assert found.ratios.dtype == torch.float32
    np.testing.assert_allclose(found.ratios.numpy(), expected, rtol=RTOL, atol=0)


def same_latest(a: Latest | None, b: Latest | None) -> bool:
    """Whether two records are the same, to the bit."""
    if a is None or b is None:
        return a is b
    return a.number == b.number and torch.equal(a.ratios.nan_to_num(-1), b.ratios.nan_to_num(-1))


def is_tracked(step: int, every: int) -> bool:
    """Whether the step of this number is tracked where tracking began with the first."""
    return math.remainder(step - 1, every) == 0
