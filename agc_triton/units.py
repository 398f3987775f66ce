"""What a unit is: shape, strides and unit_dim -> number, length and stride of the units."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Types whose memory is what it seems: no subclass.
PLAIN = (Tensor, torch.nn.Parameter)


class UnitLayout(NamedTuple):
    """A dense tensor's elements in memory order, seen as (batch, outer, units, inner).

    Element ``(b, o, u, i)`` lies ``((b * outer + o) * units + u) * inner + i`` elements from the
    start and belongs to unit ``b * units + u``. ``outer == 1`` is the common case: every unit is
    one contiguous row, and ``batch`` is 1.
    """

    batch: int
    outer: int
    units: int
    inner: int

    @property
    def length(self) -> int:
        """Elements in one unit."""
        return self.outer * self.inner

    @property
    def n_units(self) -> int:
        """Units in the tensor."""
        return self.batch * self.units


@functools.lru_cache(maxsize=4096)
def unit_dims(shape: torch.Size, unit_dim: int | None) -> tuple[int, ...]:
    """The dimensions that index units; none where the whole tensor is one unit.

    Tensors of squeezed rank <= 1 (scalars, biases, gains shaped (C, 1, 1, 1)) are one unit, as in
    the authors' JAX code (Brock et al. 2021, arXiv 2102.06171) and optax. ``unit_dim`` None is 0.

    Raises:
        ValueError: ``unit_dim`` is out of range for ``shape``.
    """
    if sum(size != 1 for size in shape) <= 1:
        return ()
    dim = 0 if unit_dim is None else unit_dim
    if not -len(shape) <= dim < len(shape):
        raise ValueError(
            f"unit_dim {dim} is out of range for shape {tuple(shape)}, which takes {-len(shape)} to"
            f" {len(shape) - 1}"
        )
    return (dim % len(shape),)


def has_units(shape: torch.Size, unit_dim: int | None) -> bool:
    """Whether ``unit_dim`` is in range for a shape."""
    try:
        unit_dims(shape, unit_dim)
    except ValueError:
        return False
    return True


def norm_dims(shape: torch.Size, unit_dim: int | None) -> tuple[int, ...]:
    """The dimensions that a unit's norm is taken over.

    Raises:
        ValueError: ``unit_dim`` is out of range for ``shape``.
    """
    dims = unit_dims(shape, unit_dim)
    return tuple(d for d in range(len(shape)) if d not in dims)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from slowest to fastest in memory, or None if the tensor is not dense.

    Dense means non-overlapping and without holes: contiguous, channels_last or any permutation.
    """
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None


@functools.lru_cache(maxsize=4096)
def unit_layout(shape: torch.Size, order: tuple[int, ...], unit_dim: int | None) -> UnitLayout:
    """How the units of a dense tensor of this shape and memory order lie in memory.

    Raises:
        ValueError: ``unit_dim`` is out of range for ``shape``.
    """
    dims = unit_dims(shape, unit_dim)
    if not dims:
        return UnitLayout(1, 1, 1, math.prod(shape))
    (dim,) = dims
    at = order.index(dim)
    return UnitLayout(
        batch=1,
        outer=math.prod(shape[d] for d in order[:at]),
        units=shape[dim],
        inner=math.prod(shape[d] for d in order[at + 1 :]),
    )
