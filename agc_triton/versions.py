"""Telling autograd of writes that it does not see."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version


def count_writes(tensors: Sequence[Tensor]) -> None:
    """Count a write to each tensor, as torch's in-place operations do and its fused ones do not.

    A backward pass that still needs the old values then raises instead of using the new ones.
    """
    try:
        increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        increment_version([tensor for tensor in tensors if not tensor.is_inference()])
