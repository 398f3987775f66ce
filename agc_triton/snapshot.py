"""Whether tensors are still laid out as they were, asked before every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# What torch.compile asks before it runs compiled code: one call for all tensors, in a fifth of the
# time of asking each for its shape, strides and dtype. Private, so it may be missing.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards: Any = getattr(_guards, "TensorGuards", None)


class Layouts:
    """The shapes, strides, dtypes and devices of tensors; it keeps none of them alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.kinds = [(t.dtype, t.device) for t in tensors]
        self.shapes = [t.shape for t in tensors]
        self.strides = [t.stride() for t in tensors]
        self._guards: Any = None

    def fit(self, tensors: Sequence[Any]) -> bool:
        """Whether each of these has its shape, strides, dtype and device, and no lazy bits.

        None and sparse tensors do not.
        """
        if self._guards is not None and self._guards.check(*tensors):
            return True
        try:
            same = (
                list(map(Tensor.stride, tensors)) == self.strides
                and list(map(Tensor.size, tensors)) == self.shapes
                and [(t.dtype, t.device) for t in tensors] == self.kinds
                and not any(t.is_conj() or t.is_neg() for t in tensors)
            )
        except (TypeError, RuntimeError):
            return False
        if same:
            self._guards = self._watch(tensors)
        return same

    def _watch(self, tensors: Sequence[Tensor]) -> Any:
        """Guards that pass on tensors of the same types, keys and layouts as these."""
        if TensorGuards is None:
            return None
        sizes = [list(shape) for shape in self.shapes]
        strides = [list(stride) for stride in self.strides]
        try:
            return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        except (TypeError, RuntimeError):  # another torch may make them otherwise
            return None
