"""Triton's interpreter: faster over long reductions, and with NaN as on a GPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch


def interpret_without_gpu() -> None:
    """Let kernels run on CPU tensors where there is no GPU; before agc_triton is imported."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    # As a tree of whole halves, as a GPU folds them: the kernel's own combine function is called 12
    # times instead of 4095 for 4096 elements.
    one_by_one = ReduceOps.generic_reduce

    def in_halves(self: Any, blocks: Any) -> Any:
        if self.axis is None or self.keep_dims:
            return one_by_one(self, blocks)
        data, dtypes = [block.handle.data for block in blocks], [block.dtype for block in blocks]
        while data[0].shape[self.axis] > 1:
            halves = zip(*(np.split(array, 2, self.axis) for array in data), strict=True)
            low, high = (
                [self.to_tensor(a, t) for a, t in zip(half, dtypes, strict=True)] for half in halves
            )
            data = [block.handle.data for block in self.combine_fn.fn(*low, *high)]
        return [self.to_tensor(a.squeeze(self.axis), t) for a, t in zip(data, dtypes, strict=True)]

    ReduceOps.generic_reduce = in_halves
    # tl.maximum and tl.minimum drop NaN as on a GPU unless they are told to propagate it.
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        setattr(InterpreterBuilder, name, _binary(function))


def _binary(function: Any) -> Any:
    return lambda self, left, right: self.binary_op(left, right, function)
