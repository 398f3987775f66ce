"""DTensors: which of their units a rank holds whole, and what lies on it."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agc_triton.units import PLAIN, UnitDim, unit_axes


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; torch.distributed is not imported for that."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """What of a DTensor lies on this rank; any other tensor as it is."""
    here: Tensor = tensor
    if is_sharded(tensor):
        with torch.no_grad():
            here = tensor.to_local()
    return here


def placed_alike(a: Any, b: Any) -> bool:
    """Whether two tensors are both plain, or DTensors that lie on the ranks alike."""
    placed: bool = getattr(a, "placements", None) == getattr(b, "placements", None)
    return placed


def split_dims(param: Any, unit_dim: UnitDim) -> tuple[int, ...] | None:
    """The dimensions of a DTensor's mesh between whose ranks its units are split.

    None where its parts cannot be told from the placements and ``unit_dim`` alone.
    """
    return _split_dims(param.shape, tuple(param.placements), unit_dim)


@functools.lru_cache(maxsize=4096)
def _split_dims(
    shape: torch.Size, placements: tuple[Any, ...], unit_dim: UnitDim
) -> tuple[int, ...] | None:
    axes = dict(unit_axes(shape, unit_dim))
    if any(parts != shape[dim] for dim, parts in axes.items()):
        return None
    if axes and all(size == 1 for dim, size in enumerate(shape) if dim not in axes):
        return None  # a part of it might look like a single unit
    found = []
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial():
            return None
        if not placement.is_replicate() and placement.dim not in axes:
            found.append(mesh_dim)
    return tuple(found)


def process_groups(param: Any, dims: Sequence[int]) -> list[Any]:
    """The process groups of these mesh dimensions that have more than this rank."""
    mesh = param.device_mesh
    return [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]


class Kind(enum.Enum):
    """How a parameter's units lie on the ranks: whole, as a plain tensor's; split; or unknown."""

    WHOLE = enum.auto()
    SPLIT = enum.auto()
    OTHER = enum.auto()


def kind_of(param: Tensor, unit_dim: UnitDim) -> Kind:
    """How its units lie; a plain tensor's are whole."""
    if not is_sharded(param):
        return Kind.WHOLE
    dims = split_dims(param, unit_dim)
    return Kind.OTHER if dims is None else Kind.SPLIT if dims else Kind.WHOLE
