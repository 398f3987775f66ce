"""What a unit is: shape, strides and unit_dim -> number, length and stride of the units."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

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


# A dimension that indexes units, or with a number of equal parts into which it is cut, each of
# which is of one unit: a ConvTranspose's inputs by group.
Dim = int | tuple[int, int]
# What a group says: None is 0, "tensor" makes one unit of every tensor.
UnitDim = int | tuple[Dim, ...] | str | None


@functools.lru_cache(maxsize=4096)
def unit_axes(shape: torch.Size, unit_dim: UnitDim) -> tuple[tuple[int, int], ...]:
    """The dimensions that index units, each with its number of parts; none for a single unit.

    Tensors of squeezed rank <= 1 (scalars, biases, gains shaped (C, 1, 1, 1)) are one unit, as in
    the authors' JAX code (Brock et al. 2021, arXiv 2102.06171) and optax.

    Raises:
        ValueError: ``unit_dim`` does not fit ``shape``.
    """
    if unit_dim == "tensor" or sum(size != 1 for size in shape) <= 1:
        return ()
    found: dict[int, int] = {}
    for dim, parts in dims_and_parts(unit_dim):
        if not -len(shape) <= dim < len(shape):
            raise ValueError(
                f"unit_dim {unit_dim} is out of range for shape {tuple(shape)}, whose dimensions"
                f" are {-len(shape)} to {len(shape) - 1}"
            )
        size = shape[dim]
        if parts and size % parts:
            raise ValueError(
                f"unit_dim {unit_dim} cuts dimension {dim} of shape {tuple(shape)} into {parts}"
                " parts, which are not equal"
            )
        if dim % len(shape) in found:
            raise ValueError(f"unit_dim {unit_dim} names a dimension of {tuple(shape)} twice")
        found[dim % len(shape)] = parts or size
    if all(found.get(dim) == size for dim, size in enumerate(shape)):
        raise ValueError(
            f"unit_dim {unit_dim} leaves no dimension of shape {tuple(shape)} to take norms over"
        )
    return tuple(sorted(found.items()))


def dims_and_parts(unit_dim: UnitDim) -> list[tuple[int, int]]:
    """The dimensions of a ``unit_dim``, each with the parts it is cut into, or 0.

    Raises:
        TypeError: it is something else.
    """
    dims: Any = (0 if unit_dim is None else unit_dim,)
    if isinstance(unit_dim, tuple):
        dims = unit_dim
    pairs = [dim if isinstance(dim, tuple) else (dim, 0) for dim in dims]
    for pair in pairs or [()]:
        if len(pair) != 2 or not all(type(number) is int for number in pair) or pair[1] < 0:
            raise TypeError(
                "unit_dim must be an int, a tuple of ints or (int, parts) pairs, 'tensor' or None,"
                f" not the {type(unit_dim).__name__} {unit_dim!r}"
            )
    return pairs


def has_units(shape: torch.Size, unit_dim: UnitDim) -> bool:
    """Whether ``unit_dim`` fits a shape."""
    try:
        unit_axes(shape, unit_dim)
    except ValueError:
        return False
    return True


def count_units(shape: torch.Size, unit_dim: UnitDim) -> int:
    """How many units a tensor has.

    Raises:
        ValueError: ``unit_dim`` does not fit ``shape``.
    """
    return math.prod(parts for _, parts in unit_axes(shape, unit_dim))


@functools.lru_cache(maxsize=4096)
def unfolded(shape: torch.Size, unit_dim: UnitDim) -> tuple[torch.Size, tuple[int, ...]]:
    """A shape with dimensions that are cut into parts as two, and the dimensions of norms in it.

    Raises:
        ValueError: ``unit_dim`` does not fit ``shape``.
    """
    axes, sizes, dims = dict(unit_axes(shape, unit_dim)), list[int](), list[int]()
    for dim, size in enumerate(shape):
        parts = axes.get(dim)
        if parts is not None:
            sizes.append(parts)
            if parts == size:
                continue
        dims.append(len(sizes))
        sizes.append(size // (parts or 1))
    return torch.Size(sizes), tuple(dims)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from slowest to fastest in memory, or None if the tensor is not dense.

    Dense means non-overlapping and without holes: contiguous, channels_last or any permutation.
    """
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None


@functools.lru_cache(maxsize=4096)
def unit_layout(shape: torch.Size, order: tuple[int, ...], unit_dim: UnitDim) -> UnitLayout | None:
    """How the units of a dense tensor of this shape and memory order lie in memory.

    None where they lie in no such pattern, as when units alternate with others more than twice.

    Raises:
        ValueError: ``unit_dim`` does not fit ``shape``.
    """
    return axes_layout(shape, order, unit_axes(shape, unit_dim))


def axes_layout(
    shape: torch.Size, order: tuple[int, ...], unit_axes: tuple[tuple[int, int], ...]
) -> UnitLayout | None:
    """The same for units that these dimensions index, each with its number of parts."""
    axes = dict(unit_axes)
    # From slowest to fastest, neighbours of a kind as one: whether they index units, and sizes.
    runs: list[tuple[bool, int]] = []
    for dim in order:
        parts = axes.get(dim, 1)
        for units, size in ((True, parts), (False, shape[dim] // parts if parts else 0)):
            if size == 1:
                continue
            if runs and runs[-1][0] == units:
                size *= runs.pop()[1]
            runs.append((units, size))
    layout = []
    for units in (True, False, True, False):
        fits = bool(runs) and runs[0][0] == units
        layout.append(runs.pop(0)[1] if fits else 1)
    if runs:
        return None
    batch, outer, units_, inner = layout
    if outer == 1 or units_ == 1:  # one row each
        return UnitLayout(1, 1, batch * units_, outer * inner)
    return UnitLayout(batch, outer, units_, inner)
