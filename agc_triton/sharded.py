"""DTensors: which of their units a rank holds whole, and what lies on it."""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from agc_triton.units import (
    PLAIN,
    UnitDim,
    UnitLayout,
    axes_layout,
    has_units,
    memory_order,
    unit_axes,
)

# to_local makes another tensor of a parameter at every call.
_local = attrgetter("_local_tensor")
_spec = attrgetter("_spec")
_grad = attrgetter("grad")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; torch.distributed is not imported for that."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any is a DTensor."""
    return any(hasattr(kind, "placements") for kind in set(map(type, tensors)).difference(PLAIN))


def local(tensor: Any) -> Tensor:
    """What of a DTensor lies on this rank; any other tensor as it is."""
    here: Tensor = tensor
    if is_sharded(tensor):
        here = _local(tensor)
    return here


def locals_of(tensors: Iterable[Any]) -> list[Any]:
    """What of each lies on this rank; None stays."""
    tensors = list(tensors)
    try:
        return list(map(_local, tensors))
    except AttributeError:  # not all are DTensors
        return [t if t is None or type(t) in PLAIN else local(t) for t in tensors]


def placed_alike(a: Any, b: Any) -> bool:
    """Whether two tensors are both plain, or DTensors that lie on the ranks alike."""
    return all(
        getattr(a, key, None) == getattr(b, key, None) for key in ("placements", "device_mesh")
    )


def place_gradients(params: Iterable[Any]) -> bool:
    """Bring gradients to where their DTensors lie; whether they lie there now.

    Sums over ranks that are missing are made: gradients come so from SequenceParallel.
    """
    params = list(params)
    grads = list(map(_grad, params))
    try:
        if all(map(is_, map(_spec, grads), map(_spec, params))):  # as fully_shard makes them
            return True
    except AttributeError:  # some have no gradient, or are no DTensors
        pass
    for param, grad in zip(params, grads, strict=True):
        if grad is None or placed_alike(grad, param):
            continue
        if getattr(grad, "device_mesh", 0) != getattr(param, "device_mesh", 1):
            return False
        with torch.no_grad():
            param.grad = grad.redistribute(placements=param.placements)
    return True


class Kind(enum.Enum):
    """How a parameter's units lie on the ranks: whole, as a plain tensor's; split; or unknown."""

    WHOLE = enum.auto()
    SPLIT = enum.auto()
    OTHER = enum.auto()


def kind_of(param: Any, unit_dim: UnitDim) -> Kind:
    """How its units lie, told from placements and ``unit_dim`` alone; a plain tensor's are whole.

    A mesh dimension of one rank splits nothing.
    """
    if not is_sharded(param):
        return Kind.WHOLE
    dims = _split_dims(param.shape, *_placed(param), unit_dim)
    return Kind.OTHER if dims is None else Kind.SPLIT if dims else Kind.WHOLE


def process_groups(param: Any, unit_dim: UnitDim) -> list[Any]:
    """The process groups between whose ranks the units of a parameter are split."""
    dims = _split_dims(param.shape, *_placed(param), unit_dim)
    return [param.device_mesh.get_group(dim) for dim in dims or ()]


def mesh_groups(params: Iterable[Any]) -> list[Any]:
    """The process groups, of more than one rank, that share any of these DTensors."""
    groups: dict[str, Any] = {}
    for param in filter(is_sharded, params):
        mesh = param.device_mesh
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                groups[group.group_name] = group
    return list(groups.values())


def repeated(param: Any, unit_dim: UnitDim, whole: bool) -> tuple[bool, bool]:
    """Whether others share this rank's units and count them, and whether all of it is theirs too.

    Of ranks that hold the same, the first of each mesh dimension counts; all hold the ``whole``.
    """
    if not is_sharded(param):
        return False, False
    mesh = param.device_mesh
    behind = [dim for dim in range(mesh.ndim) if mesh.get_local_rank(dim)]
    if whole:
        return bool(behind), bool(behind)
    split = _split_dims(param.shape, *_placed(param), unit_dim) or ()
    same = any(param.placements[dim].is_replicate() for dim in behind)
    return any(dim in split for dim in behind), same


def gathered(params: Sequence[Any], values: Sequence[Any]) -> list[list[Any]]:
    """A value per parameter from all ranks of its mesh; a plain one's from this rank alone.

    All ranks have to call it.
    """
    found = [[value] for value in values]
    meshes: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if is_sharded(param):
            meshes.setdefault(param.device_mesh, []).append(i)
    for mesh, own in meshes.items():
        for dim in filter(lambda dim: mesh.size(dim) > 1, range(mesh.ndim)):
            there: list[Any] = [None] * mesh.size(dim)
            given = [found[i] for i in own]
            torch.distributed.all_gather_object(there, given, group=mesh.get_group(dim))
            for at, i in enumerate(own):
                found[i] = [value for of_rank in there for value in of_rank[at]]
    return found


def axes_here(param: Any, unit_dim: UnitDim) -> tuple[tuple[int, int], ...]:
    """As `unit_axes`, of what lies on this rank: the units of a part are those of the whole."""
    axes = unit_axes(param.shape, unit_dim)
    if not is_sharded(param):
        return axes
    here = local(param).shape
    return tuple((dim, here[dim] if n == param.shape[dim] else n) for dim, n in axes)


def units_here(param: Any, unit_dim: UnitDim) -> int:
    """How many units have a part on this rank, which may be an empty one."""
    return math.prod(parts for _, parts in axes_here(param, unit_dim))


def layout_here(param: Any, unit_dim: UnitDim) -> UnitLayout | None:
    """How the units of a dense tensor, or of what of it lies on this rank, lie in memory.

    Raises:
        ValueError: ``unit_dim`` does not fit its shape.
    """
    here = local(param)
    order = memory_order(here)
    return None if order is None else axes_layout(here.shape, order, axes_here(param, unit_dim))


def _placed(param: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    return tuple(param.placements), tuple(param.device_mesh.shape)


@functools.lru_cache(maxsize=4096)
def _split_dims(
    shape: torch.Size, placements: tuple[Any, ...], mesh: tuple[int, ...], unit_dim: UnitDim
) -> tuple[int, ...] | None:
    """The mesh dimensions between whose ranks units are split; None where that is unknown."""
    if not has_units(shape, unit_dim):
        return None
    axes = dict(unit_axes(shape, unit_dim))
    if axes and all(size == 1 for dim, size in enumerate(shape) if dim not in axes):
        return None  # a part of it might look like a single unit
    found = []
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial():
            return None
        if placement.is_replicate() or mesh[mesh_dim] == 1:
            continue
        dim = placement.dim % len(shape)
        if dim not in axes:
            found.append(mesh_dim)
        elif axes[dim] != shape[dim]:
            return None  # where parts of a dimension end is not where ranks do
    return tuple(found)
