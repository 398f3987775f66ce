"""Triton's interpreter: faster over long reductions, and with NaN as on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

_one_by_one = ReduceOps.generic_reduce


def _in_halves(self: Any, blocks: Any) -> Any:
    if self.axis is None or self.keep_dims:
        return _one_by_one(self, blocks)
    data, dtypes = [block.handle.data for block in blocks], [block.dtype for block in blocks]
    while data[0].shape[self.axis] > 1:
        halves = zip(*(np.split(array, 2, self.axis) for array in data), strict=True)
        low, high = ([self.to_tensor(a, t) for a, t in zip(h, dtypes, strict=True)] for h in halves)
        data = [block.handle.data for block in self.combine_fn.fn(*low, *high)]
    return [self.to_tensor(a.squeeze(self.axis), t) for a, t in zip(data, dtypes, strict=True)]


def reduce_in_halves() -> None:
    """Fold blocks as a tree of whole halves, as a GPU does, where the interpreter folds in Python.

    It calls the kernel's own combine function, 12 times instead of 4095 for 4096 elements.
    """
    ReduceOps.generic_reduce = _in_halves


def drop_nan() -> None:
    """Let tl.maximum and tl.minimum drop NaN as a GPU does unless it is told to propagate it."""
    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        setattr(InterpreterBuilder, name, _binary(function))


def _binary(function: Any) -> Any:
    return lambda self, left, right: self.binary_op(left, right, function)
