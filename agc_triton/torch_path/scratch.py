"""Memory that the blocks of a step share: clipped gradients, and 16-bit values in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from agc_triton.norms import norm_dtype


class Scratch:
    """Views of memory that is used again for every block of a step.

    A block lies in its middle, whatever its size: torch's threads take equal shares of it, so each
    writes about where it wrote before. Taking over lines that another core wrote last can cost more
    than the multiplication itself.

    Args:
        largest: elements of the largest view; memory that grows is new to the caches every time.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._memory: dict[torch.dtype, Tensor] = {}
        self._held: Tensor | None = None
        self._views: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def room(self, like: Tensor) -> Tensor:
        """Memory of a tensor's dtype and shape, contiguous."""
        return self._view(like.dtype, like.shape)

    def scale(self, grad: Tensor, factors: Tensor, room: Tensor) -> None:
        """Put a 16-bit gradient times its factors, multiplied in fp32, in ``room``."""
        wide = self.wide(grad)
        self._held = None
        room.copy_(wide.mul_(factors))

    def wide(self, tensor: Tensor) -> Tensor:
        """A tensor of `norm_dtype`: itself, or a copy in memory that the next one is written to.

        torch's operations on two dtypes copy as well, to memory that the system has to clear.
        """
        dtype = norm_dtype(tensor.dtype)
        if tensor.dtype == dtype:
            return tensor
        room = self._view(dtype, tensor.shape)
        if self._held is not tensor:  # what a norm was taken of is often clipped next
            self._held = tensor
            room.copy_(tensor)
        return room

    def _view(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        view = self._views.get((dtype, shape))
        if view is None:
            memory, total = self._memory.get(dtype), shape.numel()
            if memory is None or memory.numel() < total:
                self._views = {key: own for key, own in self._views.items() if key[0] != dtype}
                size = max(total, self._largest)
                memory = self._memory[dtype] = torch.empty(size, dtype=dtype, device="cpu")
            start = (memory.numel() - total) // 2 & -64  # whole cache lines
            view = self._views[dtype, shape] = memory[start : start + total].view(shape)
        return view
