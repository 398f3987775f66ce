"""Arithmetic in float64 that bounds the error of an implementation with coarser roundings.

Beside each value runs a bound on how far arithmetic with coarser roundings may be from it: an
operation passes its operands' errors on and adds the rounding of its own result (running error
analysis; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.3).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.float64]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SPACING = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}  # of numbers from 1 to 2
LEAST_NORMAL = {dtype: torch.finfo(dtype).smallest_normal for dtype in DTYPES}


class Rounded:
    """A float64 array, and a bound on its error in an implementation that rounds to ``dtype``."""

    def __init__(self, value: Array, error: Array, dtype: torch.dtype) -> None:
        self.value, self.error, self.dtype = value, error, dtype

    def to(self, dtype: torch.dtype) -> Rounded:
        """In another dtype: rounded if that is coarser."""
        coarser = SPACING[dtype] > SPACING[self.dtype]
        return (rounded if coarser else Rounded)(self.value, self.error, dtype)

    def _operand(self, other: Rounded | float) -> Rounded:
        # Hyperparameters are rounded to the dtype of the operation that takes them.
        other = other if isinstance(other, Rounded) else exact(other, torch.float64)
        return other.to(self.dtype)

    def __add__(self, other: Rounded | float) -> Rounded:
        b = self._operand(other)
        return rounded(self.value + b.value, self.error + b.error, self.dtype)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.dtype)

    def __sub__(self, other: Rounded | float) -> Rounded:
        return self + -self._operand(other)

    def __mul__(self, other: Rounded | float) -> Rounded:
        b = self._operand(other)
        error = np.abs(self.value) * b.error + (np.abs(b.value) + b.error) * self.error
        return rounded(self.value * b.value, error, self.dtype)

    def __truediv__(self, other: Rounded | float) -> Rounded:
        b = self._operand(other)
        value = self.value / b.value
        # A divisor that may be 0 bounds nothing: 2**40 times itself stands for that.
        least = np.maximum(np.abs(b.value) - b.error, (np.abs(b.value) + b.error) * 2**-40)
        error = (self.error + np.abs(value) * b.error) / least
        return rounded(value, error, self.dtype)

    def __pow__(self, exponent: float) -> Rounded:
        error = exponent * self.value ** (exponent - 1) * self.error
        return rounded(self.value**exponent, error, self.dtype)

    def sqrt(self) -> Rounded:
        """Its operand's error e becomes at most e / sqrt(x), and never more than sqrt(e)."""
        least = np.maximum(self.value, np.maximum(self.error, np.finfo(np.float64).tiny))
        return rounded(np.sqrt(self.value), self.error / np.sqrt(least), self.dtype)

    def maximum(self, other: Rounded | float) -> Rounded:
        """The larger of two."""
        b = self._operand(other)
        value, error = np.maximum(self.value, b.value), np.maximum(self.error, b.error)
        return Rounded(value, error, self.dtype)

    def minimum(self, other: Rounded | float) -> Rounded:
        """The smaller of two."""
        return -(-self).maximum(-self._operand(other))

    def abs(self) -> Rounded:
        """Its magnitude."""
        return Rounded(np.abs(self.value), self.error, self.dtype)

    def sign(self) -> Rounded:
        """-1, 0 or 1, off by as much as 2 where its error decides; what is exactly 0 stays so."""
        least = SPACING[self.dtype] * LEAST_NORMAL[self.dtype]
        unsure = (np.abs(self.value) <= self.error) & ((self.value != 0) | (self.error > least))
        return Rounded(np.sign(self.value), np.where(unsure, 2.0, 0.0), self.dtype)


def exact(value: Array | float, dtype: torch.dtype) -> Rounded:
    """A value that ``dtype`` can hold."""
    return Rounded(np.asarray(value, np.float64), np.zeros(()), dtype)


def rounded(value: Array, error: Array, dtype: torch.dtype) -> Rounded:
    """Rounded once: by half the dtype's spacing, which does not shrink below normal numbers."""
    spacing = SPACING[dtype] * np.maximum(np.abs(value) + error, LEAST_NORMAL[dtype])
    return Rounded(value, error + spacing / 2, dtype)


def as_float64(tensor: Tensor) -> Array:
    """A contiguous float64 copy; complex numbers as pairs in a last dimension."""
    tensor = tensor.detach().cpu().resolve_conj()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return np.array(tensor.to(torch.float64).numpy(force=True), order="C")
