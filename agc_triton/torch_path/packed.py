"""Small tensors copied side by side, so that one call serves all whose units are equally long."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from agc_triton.norms import Clip, clip_factors, norm_dtype
from agc_triton.records import Units
from agc_triton.torch_path.scratch import Scratch
from agc_triton.torch_path.slices import Slice, Target, Tensors, target_of


class PackedBlock:
    """Several tensors and their whole units, a block as `agc_triton.torch_path.blocks.TensorBlock`.

    Units of one length are the rows of a matrix; all matrices lie in one piece of memory.
    """

    def __init__(self, slices: list[Slice], params: Tensors, states: Sequence[Tensors]) -> None:
        slices = sorted(slices, key=_length)
        self.whole = target_of(slices, params, states)
        self.targets = [self.whole]
        self.units: Units | None = None
        self._units = [slice_.view.layout.units for slice_ in slices]
        rows: defaultdict[int, int] = defaultdict(int)
        for slice_, units in zip(slices, self._units, strict=True):
            rows[_length(slice_)] += units
        self._rows = list(rows.values())
        like = self.whole.params
        sizes, dtype = [p.numel() for p in like], like[0].dtype

        def side_by_side(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
            memory = torch.empty(sum(sizes), dtype=dtype, device="cpu")
            pieces = zip(torch.split(memory, sizes), like, strict=True)
            return memory, [m if p.dim() == 1 else m.view(p.shape) for m, p in pieces]

        self._memory, self._views = side_by_side(norm_dtype(dtype))
        matrices = torch.split(self._memory, [n * length for length, n in rows.items()])
        self._matrices = [m.view(n, -1) for m, n in zip(matrices, self._rows, strict=True)]
        self._clipped, self._room = self._memory, self._views
        if dtype != self._memory.dtype:
            self._clipped, self._room = side_by_side(dtype)

    def factors(
        self, grads: list[Tensor], clip: Clip, grad_scale: Tensor | None, _scratch: Scratch
    ) -> Tensor:
        """The units' factors in one vector, for the gradients as they lie here unscaled."""
        torch._foreach_copy_(self._views, self.whole.params)
        p_norms = self._norms()
        torch._foreach_copy_(self._views, grads)
        if grad_scale is not None:
            self._memory.div_(grad_scale)
        return clip_factors(p_norms, self._norms(), clip, self.units)

    def room(self, _target: Target, _scratch: Scratch) -> list[Tensor]:
        """Where the clipped gradients will be."""
        return self._room

    def scale(
        self, _grads: list[Tensor], factors: Tensor, _room: list[Tensor], _scratch: Scratch
    ) -> None:
        """Clip the gradients that `factors` left here."""
        self._scale(factors)

    def scale_(self, grads: list[Tensor], factors: Tensor) -> None:
        """Clip what `factors` left here, and copy it back."""
        self._scale(factors)
        torch._foreach_copy_(grads, self._room)

    def _scale(self, factors: Tensor) -> None:
        for matrix, some in zip(self._matrices, torch.split(factors, self._rows), strict=True):
            matrix.mul_(some[:, None])
        if self._clipped is not self._memory:
            self._clipped.copy_(self._memory)

    def each(self, factors: Tensor) -> list[Tensor]:
        """The factors of every tensor; a 0-dim one is that of a tensor which is one unit."""
        own = zip(torch.split(factors, self._units), self._views, strict=True)
        return [f.view(() if len(f) == 1 else (-1, *[1] * (view.dim() - 1))) for f, view in own]

    def _norms(self) -> Tensor:
        """Of all units here."""
        norms = [torch.linalg.vector_norm(m, dim=1) for m in self._matrices]
        return norms[0] if len(norms) == 1 else torch.cat(norms)


def _length(slice_: Slice) -> int:
    """Elements per unit."""
    return slice_.view.layout.length
