"""Plain CPU tensors in blocks of whole units that stay in cache, and the units' clip factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from agc_triton.norms import Clip, clip_factors, norm_dtype
from agc_triton.records import Units
from agc_triton.torch_path.packed import PackedBlock
from agc_triton.torch_path.scratch import Scratch
from agc_triton.torch_path.slices import DenseView, Slice, Target, Tensors, target_of

# Elements per block: p, g, two states and the scratch of one block stay in a last-level cache and
# the few torch calls per block cost little beside it (benchmarks/tune_blocks.py).
BLOCK = 5 << 18

# Tensors up to this many elements are packed in a block: for larger ones copies cost more than the
# calls that they save.
PACKED = 1 << 15


class TensorBlock:
    """Whole units of one tensor, one target, or several where the units are long.

    A block's ``factors(grads, ...)`` finds the factors of its units, with ``grads`` the tensors of
    ``whole``; ``scale`` then fills a target's ``room`` with clipped gradients or ``scale_`` clips
    in place, and ``each`` gives the factors of every tensor of a target, which broadcast. ``units``
    are the records of those of ``whole``, one after the other; None where nothing is recorded.
    """

    def __init__(
        self,
        whole: Slice,
        slices: list[Slice],
        params: Tensors,
        states: Sequence[Tensors],
    ) -> None:
        self.targets = [target_of([slice_], params, states) for slice_ in slices]
        alone = slices == [whole]
        self.whole = self.targets[0] if alone else target_of([whole], params, states)
        (self._param,) = self.whole.params
        self._narrow = norm_dtype(self._param.dtype) != self._param.dtype
        self._dims = whole.view.norm_dims(self._param.dim())
        self.units: Units | None = None

    def factors(
        self, grads: list[Tensor], clip: Clip, grad_scale: Tensor | None, scratch: Scratch
    ) -> Tensor:
        """The units' factors, which divide by ``grad_scale`` as well."""
        (grad,) = grads
        p_norms = self._norms(self._param, scratch)
        if grad_scale is None:
            return clip_factors(p_norms, self._norms(grad, scratch), clip, self.units)
        if not clip.skip:
            g_norms = self._norms(grad, scratch) / grad_scale
        else:  # the squares of what is unscaled decide, as in the kernels
            g_norms = self._norms(grad.to(norm_dtype(grad.dtype)) / grad_scale, scratch)
        return clip_factors(p_norms, g_norms, clip, self.units) / grad_scale

    def room(self, target: Target, scratch: Scratch) -> list[Tensor]:
        """Where a target's clipped gradients go."""
        return [scratch.room(target.params[0])]

    def scale(
        self, grads: list[Tensor], factors: Tensor, room: list[Tensor], scratch: Scratch
    ) -> None:
        """Put a target's gradients times their factors in its room."""
        if self._narrow:
            scratch.scale(grads[0], factors, room[0])
        else:
            torch.mul(grads[0], factors, out=room[0])

    def scale_(self, grads: list[Tensor], factors: Tensor) -> None:
        """Multiply a target's gradients with their factors where they are."""
        grads[0].mul_(factors)

    def each(self, factors: Tensor) -> list[Tensor]:
        """The factors of every tensor of a target."""
        return [factors]

    def _norms(self, tensor: Tensor, scratch: Scratch) -> Tensor:
        if self._narrow:
            tensor = scratch.wide(tensor)
        norms: Tensor = torch.linalg.vector_norm(tensor, 2, self._dims, True)
        return norms


Block = TensorBlock | PackedBlock


def blocks(
    views: Mapping[int, DenseView], params: Tensors, states: Sequence[Tensors]
) -> list[Block]:
    """Blocks of about `BLOCK` elements: slices of a large tensor each, or several small tensors.

    Args:
        views: of parameters of one dtype, by their index.
        params: those, by their index.
        states: a role each, by the same index; empty where it is switched off.
    """
    found: list[Block] = []
    small: list[Slice] = []
    for member, view in views.items():
        slice_ = Slice(member, view)
        if view.strided or params[member].numel() > PACKED:
            found += [TensorBlock(whole, parts, params, states) for whole, parts in _cut(slice_)]
        else:
            small.append(slice_)
    return [*found, *(PackedBlock(slices, params, states) for slices in _filled(small))]


def largest_room(blocks: Sequence[Block]) -> int:
    """Elements of the largest target that is clipped in memory which blocks share."""
    targets = (t for block in blocks if isinstance(block, TensorBlock) for t in block.targets)
    return max((target.params[0].numel() for target in targets), default=0)


def _filled(slices: list[Slice]) -> Iterator[list[Slice]]:
    """Lists of tensors of about `BLOCK` elements."""
    filled: list[Slice] = []
    elements = 0
    for slice_ in slices:
        size = math.prod(slice_.view.layout)
        if elements + size > BLOCK and filled:
            yield filled
            filled, elements = [], 0
        filled.append(slice_)
        elements += size
    if filled:
        yield filled


def _cut(slice_: Slice) -> Iterator[tuple[Slice, list[Slice]]]:
    """A tensor's units, cut evenly into blocks; of each the whole and the slices to update."""
    batch, outer, units, inner = slice_.view.layout
    length = outer * inner
    if slice_.view.strided:
        for rows in _even(batch, BLOCK // (units * length)):
            whole = slice_ if rows[1] == batch else slice_._replace(rows=rows)
            columns = _even(outer, BLOCK // (rows[1] * units * inner))
            yield whole, [whole._replace(columns=c) for c in columns]
        return
    if units == 1:
        slice_ = slice_._replace(flat=True)
    for start, size in _even(units, -(-units // -(-units * length // BLOCK))):
        whole = slice_ if size == units else slice_._replace(rows=(start, size))
        # One unit alone may be longer than a block.
        if size > 1 or length <= BLOCK:
            yield whole, [whole]
        else:
            flat = whole._replace(flat=True)
            yield flat, [flat._replace(columns=c) for c in _even(length, BLOCK)]


def _even(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and size of pieces of ``size`` >= 1 each, and what is left."""
    size = max(1, size)
    for start in range(0, length, size):
        yield start, min(size, length - start)
