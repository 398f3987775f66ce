"""Row-sparse gradients, as of an embedding, of which each row that is there is a unit."""

from __future__ import annotations

import torch
from torch import Tensor

from agc_triton.units import UnitDim, unit_axes


def check_sparse_rows(param: Tensor, grad: Tensor, unit_dim: UnitDim, name: str) -> None:
    """Check that a gradient that is not strided can be clipped against its parameter.

    Raises:
        RuntimeError: it cannot; ``name`` is what the message calls the parameter.
    """
    if (
        grad.layout is not torch.sparse_coo
        or param.dim() != 2
        or grad.sparse_dim() != 1
        or unit_axes(param.shape, unit_dim) not in ((), ((0, len(param)),))
    ):
        raise RuntimeError(
            f"the sparse gradient of {name} cannot be clipped: only row-sparse COO gradients of"
            " rank-2 parameters with unit_dim 0 can; use a dense gradient or clipping=0"
        )
