"""Plain CPU tensors in blocks of whole units that stay in cache, and the units' clip factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from agc_triton.norms import Clip, clip_factors, norm_dtype
from agc_triton.torch_path.joined import Joined
from agc_triton.torch_path.scratch import Scratch
from agc_triton.torch_path.slices import Cut, Part, Tensors, Walk, cut_out

# Elements per block: p, g, two states and the scratch of one block stay in a last-level cache and
# the few torch calls per block cost little beside it (benchmarks/tune_blocks.py).
BLOCK = 5 << 18

# Tensors up to this many elements are joined in a block: for larger ones copies cost more than the
# calls that they save.
JOINED = 1 << 15


class Single:
    """Whole units of one tensor, updated in one part, or in several where the tensor is long.

    A block's ``factors(grads, ...)`` finds the factors of its units, with ``grads`` the tensors of
    ``whole``; ``scale`` then fills a part's ``room`` with clipped gradients or ``scale_`` clips in
    place, and ``each`` gives the factors of every tensor of a part, which broadcast.
    """

    def __init__(
        self,
        cut: Cut,
        parts: list[Cut],
        params: Tensors,
        states: Sequence[Tensors],
    ) -> None:
        self.parts = [cut_out([part], params, states) for part in parts]
        self.whole = self.parts[0] if parts == [cut] else cut_out([cut], params, states)
        (self._param,) = self.whole.params
        self._narrow = norm_dtype(self._param.dtype) != self._param.dtype
        self._dims = (0, 2) if cut.walk.strided else tuple(range(1, self._param.dim()))

    def factors(
        self, grads: list[Tensor], clip: Clip, grad_scale: Tensor | None, scratch: Scratch
    ) -> Tensor:
        """The units' factors, which divide by ``grad_scale`` as well."""
        (grad,) = grads
        p_norms = self._norms(self._param, scratch)
        if grad_scale is None:
            return clip_factors(p_norms, self._norms(grad, scratch), clip)
        if clip.skipped is None:
            g_norms = self._norms(grad, scratch) / grad_scale
        else:  # the squares of what is unscaled decide, as in the kernels
            g_norms = self._norms(grad.to(norm_dtype(grad.dtype)) / grad_scale, scratch)
        return clip_factors(p_norms, g_norms, clip) / grad_scale

    def room(self, part: Part, scratch: Scratch) -> list[Tensor]:
        """Where a part's clipped gradients go."""
        return [scratch.room(part.params[0])]

    def scale(
        self, grads: list[Tensor], factors: Tensor, room: list[Tensor], scratch: Scratch
    ) -> None:
        """Put a part's gradients times their factors in its room."""
        if self._narrow:
            scratch.scale(grads[0], factors, room[0])
        else:
            torch.mul(grads[0], factors, out=room[0])

    def scale_(self, grads: list[Tensor], factors: Tensor) -> None:
        """Multiply a part's gradients with their factors where they are."""
        grads[0].mul_(factors)

    def each(self, factors: Tensor) -> list[Tensor]:
        """The factors of every tensor of a part."""
        return [factors]

    def _norms(self, tensor: Tensor, scratch: Scratch) -> Tensor:
        if self._narrow:
            tensor = scratch.wide(tensor)
        norms: Tensor = torch.linalg.vector_norm(tensor, 2, self._dims, True)
        return norms


Block = Single | Joined


def blocks(walks: Mapping[int, Walk], params: Tensors, states: Sequence[Tensors]) -> list[Block]:
    """Blocks of about `BLOCK` elements: a part of a large tensor each, or several small tensors.

    Args:
        walks: of parameters of one dtype, by their index.
        params: those, by their index.
        states: a role each, by the same index; empty where it is switched off.
    """
    found: list[Block] = []
    small: list[Cut] = []
    for member, walk in walks.items():
        cut = Cut(member, walk)
        if walk.strided or params[member].numel() > JOINED:
            found += [Single(whole, cuts, params, states) for whole, cuts in _cut(cut)]
        else:
            small.append(cut)
    return [*found, *(Joined(cuts, params, states) for cuts in _filled(small))]


def largest_room(blocks: Sequence[Block]) -> int:
    """Elements of the largest part that is clipped in memory which blocks share."""
    parts = (part for block in blocks if isinstance(block, Single) for part in block.parts)
    return max((part.params[0].numel() for part in parts), default=0)


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
