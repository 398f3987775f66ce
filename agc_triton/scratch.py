"""Memory that the blocks of a step share: clipped gradients, and 16-bit values in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agc_triton.blocks import JOINED, Block, Part
from agc_triton.norms import norm_dtype


class Scratch:
    """Views of memory that is used again for every block of a step.

    A block lies in its middle, whatever its size: torch's threads take equal shares of it, so each
    writes about where it wrote before. Taking over lines that another core wrote last can cost more
    than the multiplication itself.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        parts = (part for block in blocks for part in block.parts)
        # As large as it will be: memory that grows is new to the caches every time.
        self._largest = max(sum(p.numel() for p in part.params) for part in parts)
        self._memory: dict[torch.dtype, Tensor] = {}
        self._held: Tensor | None = None
        self._views: dict[tuple[torch.dtype, tuple[torch.Size, ...]], list[Tensor]] = {}

    def room(self, part: Part) -> list[Tensor]:
        """Where a part's clipped gradients go; nowhere (empty) where new memory costs less."""
        first, dtype = part.params[0], part.params[0].dtype
        if len(part.params) > 1 and first.numel() <= JOINED and dtype == norm_dtype(dtype):
            return []
        return self._views_like(dtype, part.params)

    def clipped(
        self, grads: list[Tensor], factors: list[Tensor], room: list[Tensor]
    ) -> list[Tensor]:
        """The gradients times their factors, contiguous, of the gradients' dtype, in ``room``."""
        if not room:
            return list(torch._foreach_mul(grads, factors))
        for grad, factor, view in zip(grads, factors, room, strict=True):
            wide = self.wide(grad)
            if wide is grad:
                torch.mul(grad, factor, out=view)
            else:
                self._held = None
                view.copy_(wide.mul_(factor))
        return room

    def wide(self, tensor: Tensor) -> Tensor:
        """A tensor of `norm_dtype`: itself, or a copy in memory that the next one is written to.

        torch's operations on two dtypes copy as well, to memory that the system has to clear.
        """
        dtype = norm_dtype(tensor.dtype)
        if tensor.dtype == dtype:
            return tensor
        (room,) = self._views_like(dtype, [tensor])
        if self._held is not tensor:  # what a norm was taken of is often clipped next
            self._held = tensor
            room.copy_(tensor)
        return room

    def _views_like(self, dtype: torch.dtype, like: list[Tensor]) -> list[Tensor]:
        """Views of the shapes of some tensors, side by side."""
        shapes = tuple(tensor.shape for tensor in like)
        views = self._views.get((dtype, shapes))
        if views is None:
            sizes = [shape.numel() for shape in shapes]
            memory, total = self._memory.get(dtype), sum(sizes)
            if memory is None or memory.numel() < total:
                self._views = {key: own for key, own in self._views.items() if key[0] != dtype}
                size = max(total, self._largest)
                memory = self._memory[dtype] = torch.empty(size, dtype=dtype, device="cpu")
            start = (memory.numel() - total) // 2 & -64  # whole cache lines
            parts = torch.split(memory[start : start + total], sizes)
            views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            self._views[dtype, shapes] = views
        return views
