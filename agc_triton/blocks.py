"""Walks plain CPU tensors in blocks of whole units that stay in cache, with their clip factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agc_triton.norms import clip_factors, norm_dtype, unit_norms
from agc_triton.rule import Clip
from agc_triton.units import UnitLayout, memory_order, unit_layout

# Elements per block: p, g, two states and the scratch of one block stay in a last-level cache and
# the ~10 torch calls per block cost little beside it (benchmarks/torch_path.py --sweep).
BLOCK = 5 << 18

# Tensors up to this many elements share a block, one call per operation for all of them.
SMALL = 1 << 16

PLAIN = (Tensor, torch.nn.Parameter)


class Piece(NamedTuple):
    """Whole units of one tensor, or a part of one unit, contiguous in memory.

    ``member`` is the tensor's index, ``views`` are its parameter, gradient and states. ``factors``
    are the clip factors of their units, which broadcast; a 0-dim factor is that of views that are
    one unit as they are.
    """

    member: int
    views: tuple[Tensor, ...]
    factors: Tensor


class Walk(NamedTuple):
    """How a tensor is walked: how its dimensions are permuted to be contiguous, and its units."""

    permutation: tuple[int, ...] | None
    layout: UnitLayout

    def view(self, tensor: Tensor) -> Tensor:
        """In memory order, its units first: contiguous if one unit, else (outer, units, inner).

        Units without an outer come as the tensor has them where they are its first dimension: every
        view counts, between blocks that fill the caches even the smallest takes microseconds.
        """
        outer, units, inner = self.layout
        if self.permutation is not None:
            tensor = tensor.permute(self.permutation)
        if units == 1:
            return tensor.contiguous()
        if outer > 1:
            return tensor.reshape(self.layout)
        return tensor if tensor.shape[0] == units else tensor.reshape(units, inner)


def find_walk(param: Tensor, states: Sequence[Tensor], unit_dim: int | None) -> Walk | None:
    """How a parameter and its states can be walked in step, or None where they cannot be.

    They must be plain dense CPU memory, not empty: no subclass, nothing complex, no lazy bits.
    """
    dtype, stride = param.dtype, param.stride()
    if not _is_plain(param) or dtype.is_complex or param.numel() == 0:
        return None
    order = memory_order(param)
    if order is None:
        return None
    for state in states:
        # A state loaded with other strides than its parameter's cannot be walked in step with it.
        alike = state.stride() == stride or memory_order(state) == order
        if not (alike and state.dtype == dtype and _is_plain(state)):
            return None
    permutation = None if param.is_contiguous() else order
    return Walk(permutation, unit_layout(param.shape, order, unit_dim))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.is_cpu and not tensor.is_neg()


Walked = tuple[int, Walk, Sequence[Tensor]]


def blocks(
    walked: Iterable[Walked], clip: Clip, grad_scale: Tensor | None
) -> Iterator[list[Piece]]:
    """Blocks of about `BLOCK` elements: one piece of a large tensor, or several small tensors.

    Args:
        walked: index, walk and views (of parameter, gradient, states) of tensors of one dtype;
            taken one by one.
        clip: the AGC settings.
        grad_scale: divides the gradients first; the factors divide by it as well.
    """
    packs = _Pack(_row_norms, _row_factors), _Pack(_one_unit_norms, _one_unit_factors)
    for member, walk, views in walked:
        p, layout = views[0], walk.layout
        # A product with fp32 factors is fp32: 16 bits need the out= of a single piece.
        strided = layout.outer > 1 and layout.units > 1
        if strided or p.numel() > SMALL or p.dtype != norm_dtype(p.dtype):
            rows = [view.view(1, -1) for view in views] if layout.units == 1 else views
            for part, factors in _parts(rows, strided, clip, grad_scale):
                yield [Piece(member, part, factors)]
            continue
        pack = packs[layout.units == 1]
        if pack.elements + p.numel() > BLOCK:
            yield pack.take(clip, grad_scale)
        pack.add(member, views)
    for pack in packs:
        if pack.elements:
            yield pack.take(clip, grad_scale)


Norms = Callable[[list[Tensor]], Tensor]


class _Pack:
    """Small tensors that make up a block.

    ``norms`` finds those of all their units, ``each`` gives every tensor its part of the factors.
    """

    def __init__(
        self, norms: Norms, each: Callable[[Tensor, list[Tensor]], Iterable[Tensor]]
    ) -> None:
        self.elements = 0
        self._norms, self._each = norms, each
        self._members: list[tuple[int, Sequence[Tensor]]] = []

    def add(self, member: int, views: Sequence[Tensor]) -> None:
        """Put one more in."""
        self.elements += views[0].numel()
        self._members.append((member, views))

    def take(self, clip: Clip, grad_scale: Tensor | None) -> list[Piece]:
        """Everything; nothing is left."""
        members, self._members, self.elements = self._members, [], 0
        params, grads = ([views[role] for _, views in members] for role in (0, 1))
        factors = _factors(self._norms, params, grads, clip, grad_scale)
        pairs = zip(members, self._each(factors, params), strict=True)
        return [Piece(member, tuple(views), own) for (member, views), own in pairs]


def _parts(
    views: Sequence[Tensor], strided: bool, clip: Clip, grad_scale: Tensor | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Parts of one tensor, about equal, each with its units' factors."""
    p = views[0]
    dims = (0, 2) if strided else tuple(range(1, p.dim()))

    def norms(one: list[Tensor]) -> Tensor:
        return unit_norms(one[0], dims)

    if strided:
        factors = _factors(norms, [p], [views[1]], clip, grad_scale)
        for part in _split(views, BLOCK // p[0].numel(), 0):
            yield part, factors
        return
    number = -(-p.numel() // BLOCK)
    for rows in _split(views, -(-p.shape[0] // number), 0):
        factors = _factors(norms, [rows[0]], [rows[1]], clip, grad_scale)
        if rows[0].shape[0] > 1:
            yield rows, factors
            continue
        # One unit alone may be longer than a block.
        for part in _split([t.reshape(1, -1) for t in rows], BLOCK, 1):
            yield part, factors.view(1, 1)


def _split(tensors: Sequence[Tensor], size: int, dim: int) -> Iterable[tuple[Tensor, ...]]:
    """The tensors themselves where they are small enough, else parts of ``size`` >= 1 of each."""
    if tensors[0].shape[dim] <= max(1, size):
        return [tuple(tensors)]
    return zip(*(torch.split(t, max(1, size), dim) for t in tensors), strict=True)


def _row_norms(tensors: list[Tensor]) -> Tensor:
    # In one vector, so without the sizes of 1 that `unit_norms` keeps.
    norms = [torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim()))) for t in tensors]
    return torch.cat(norms)


def _row_factors(factors: Tensor, tensors: list[Tensor]) -> Iterable[Tensor]:
    each = torch.split(factors, [t.shape[0] for t in tensors])
    return [f.view(-1, *[1] * (t.dim() - 1)) for f, t in zip(each, tensors, strict=True)]


def _one_unit_norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _one_unit_factors(factors: Tensor, tensors: list[Tensor]) -> Iterable[Tensor]:
    return factors.unbind()


def _factors(
    norms: Norms,
    params: list[Tensor],
    grads: list[Tensor],
    clip: Clip,
    grad_scale: Tensor | None,
) -> Tensor:
    """Factors of all units of one block, in the order of their ``norms``."""
    p_norms = norms(params)
    if grad_scale is None:
        return clip_factors(p_norms, norms(grads), clip)
    if clip.skipped is None:
        g_norms = norms(grads) / grad_scale
    else:  # the squares of what is unscaled decide, as in the kernels
        g_norms = norms([g.to(norm_dtype(g.dtype)) / grad_scale for g in grads])
    return clip_factors(p_norms, g_norms, clip) / grad_scale
