"""Plain CPU tensors in blocks of whole units that stay in cache, and the units' clip factors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.norms import clip_factors, norm_dtype, unit_norms
from agc_triton.rule import Clip
from agc_triton.units import UnitLayout, memory_order, unit_layout

# Elements per block: p, g, two states and the scratch of one block stay in a last-level cache and
# the few torch calls per block cost little beside it (benchmarks/torch_path.py --sweep).
BLOCK = 5 << 18

# Tensors up to this many elements share a block, one call per operation for all of them.
SMALL = 1 << 17

# Those up to this many elements are joined for their norms: for larger ones a copy costs more.
JOINED = 1 << 12

PLAIN = (Tensor, torch.nn.Parameter)


class Walk(NamedTuple):
    """How a tensor is walked: how its dimensions are permuted to be contiguous, and its units."""

    permutation: tuple[int, ...] | None
    layout: UnitLayout

    @property
    def strided(self) -> bool:
        """Whether a unit lies in several places."""
        return self.layout.outer > 1 and self.layout.units > 1

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


class Cut(NamedTuple):
    """Part of a tensor, contiguous in memory if the tensor is walked as it lies there.

    ``rows`` and ``columns`` are start and size along the first two dimensions of its walk's view,
    and ``flat`` makes one row of what is between them; None and False leave it as it is.
    """

    member: int
    walk: Walk
    rows: tuple[int, int] | None = None
    flat: bool = False
    columns: tuple[int, int] | None = None

    def of(self, tensors: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """The part of the ``member``-th tensor."""
        view = self.walk.view(tensors[self.member])
        if self.rows is not None:
            view = view.narrow(0, *self.rows)
        if self.flat:
            view = view.reshape(1, -1)
        return view if self.columns is None else view.narrow(1, *self.columns)


class Part(NamedTuple):
    """What one call updates: parts of tensors, and views of their parameters and states by role."""

    cuts: list[Cut]
    params: list[Tensor]
    states: list[list[Tensor]]


Widen = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """Whole units: what their norms are taken of, and the parts that they are updated in.

    ``norms`` finds those of all units, in one vector or of the shape of their factors; ``each``
    gives every tensor of a part its factors, which broadcast.
    """

    cuts: list[Cut]
    params: list[Tensor]
    parts: list[Part]
    norms: Callable[[list[Tensor], Widen], Tensor]
    each: Callable[[Tensor], list[Tensor]]

    def factors(
        self, grads: list[Tensor], clip: Clip, grad_scale: Tensor | None, widen: Widen
    ) -> list[Tensor]:
        """The factors of each tensor of a part; they divide by ``grad_scale`` as well.

        A 0-dim factor is that of tensors that are one unit as they are. ``widen`` makes 16 bits
        fp32 for as long as a norm takes.
        """
        p_norms = self.norms(self.params, widen)
        if grad_scale is None:
            return self.each(clip_factors(p_norms, self.norms(grads, widen), clip))
        if clip.skipped is None:
            g_norms = self.norms(grads, widen) / grad_scale
        else:  # the squares of what is unscaled decide, as in the kernels
            unscaled = [g.to(norm_dtype(g.dtype)) / grad_scale for g in grads]
            g_norms = self.norms(unscaled, widen)
        return self.each(clip_factors(p_norms, g_norms, clip) / grad_scale)


def blocks(
    walks: Mapping[int, Walk], params: Sequence[Tensor], states: Sequence[Sequence[Tensor]]
) -> list[Block]:
    """Blocks of about `BLOCK` elements: a part of a large tensor each, or several small tensors.

    Args:
        walks: of parameters of one dtype, by their index.
        params: all parameters.
        states: a list per role, as long as ``params``.
    """

    def part(cuts: list[Cut]) -> Part:
        return Part(
            cuts,
            [cut.of(params) for cut in cuts],
            [[cut.of(role) for cut in cuts] for role in states],
        )

    found: list[Block] = []
    small: list[Cut] = []
    middle: list[Cut] = []
    for member, walk in walks.items():
        cut, param = Cut(member, walk), params[member]
        if walk.strided or param.numel() > SMALL:
            found += [_large(part, whole, cuts) for whole, cuts in _cut(cut)]
        else:
            (small if param.numel() <= JOINED else middle).append(cut)
    return [*found, *(_pack(part, cuts) for some in (small, middle) for cuts in _filled(some))]


def _filled(cuts: list[Cut]) -> Iterator[list[Cut]]:
    """Lists of tensors of about `BLOCK` elements."""
    filled: list[Cut] = []
    elements = 0
    for cut in cuts:
        size = math.prod(cut.walk.layout)
        if elements + size > BLOCK and filled:
            yield filled
            filled, elements = [], 0
        filled.append(cut)
        elements += size
    if filled:
        yield filled


def _cut(cut: Cut) -> Iterator[tuple[Cut, list[Cut]]]:
    """A tensor's units, cut evenly into blocks; of each the whole and the parts to update."""
    outer, units, inner = cut.walk.layout
    if cut.walk.strided:
        yield cut, [cut._replace(rows=r) for r in _even(outer, BLOCK // (units * inner))]
        return
    if units == 1:
        cut = cut._replace(flat=True)
    length = outer * inner
    for start, size in _even(units, -(-units // -(-units * length // BLOCK))):
        whole = cut if size == units else cut._replace(rows=(start, size))
        # One unit alone may be longer than a block.
        if size > 1 or length <= BLOCK:
            yield whole, [whole]
        else:
            flat = whole._replace(flat=True)
            yield flat, [flat._replace(columns=c) for c in _even(length, BLOCK)]


def _even(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and size of parts of ``size`` >= 1 each, and what is left."""
    size = max(1, size)
    for start in range(0, length, size):
        yield start, min(size, length - start)


Parts = Callable[[list[Cut]], Part]


def _large(part: Parts, whole: Cut, cuts: list[Cut]) -> Block:
    """One block of units of one tensor, updated in as many parts as there are ``cuts``."""
    (p,) = part([whole]).params
    dims = (0, 2) if whole.walk.strided else tuple(range(1, p.dim()))
    parts = [part([cut]) for cut in cuts]

    def norms(tensors: list[Tensor], widen: Widen) -> Tensor:
        (one,) = tensors
        norm: Tensor = torch.linalg.vector_norm(widen(one), 2, dims, True)
        return norm

    return Block([whole], [p], parts, norms, lambda factors: [factors])


def _pack(part: Parts, small: list[Cut]) -> Block:
    """One block of small tensors, with one norm operation for all whose units look alike."""
    views = part(small).params
    alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, (cut, p) in enumerate(zip(small, views, strict=True)):
        one_unit = cut.walk.layout.units == 1
        alone = i if p.numel() > JOINED else None
        alike[one_unit, p.shape if one_unit else p.shape[1:], alone].append(i)
    order = [i for those in alike.values() for i in those]
    runs = [(len(those), one_unit) for (one_unit, *_), those in alike.items()]

    def norms(tensors: list[Tensor], widen: Widen) -> Tensor:
        left = iter(tensors)
        found = []
        for count, one_unit in runs:
            if count == 1:
                joined, first = next(left), 0 if one_unit else 1
            else:
                joined = (torch.stack if one_unit else torch.cat)(list(islice(left, count)))
                first = 1
            dims = tuple(range(first, joined.dim()))
            found.append(unit_norms(widen(joined), dims).flatten())
        return torch.cat(found)

    sizes = [small[i].walk.layout.units for i in order]
    shapes = [
        () if units == 1 else (-1, *[1] * (views[i].dim() - 1))
        for i, units in zip(order, sizes, strict=True)
    ]

    def each(factors: Tensor) -> list[Tensor]:
        split = torch.split(factors, sizes)
        return [f.view(shape) for f, shape in zip(split, shapes, strict=True)]

    whole = part([small[i] for i in order])
    return Block(whole.cuts, whole.params, [whole], norms, each)
