"""The functional interface: unitwise_norm and adaptive_clip_grad_."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from agc_triton import dispatch
from agc_triton.reference import clip_factors, clip_grad_, unit_norms
from agc_triton.rule import Clip
from agc_triton.units import norm_dims, resolve_unit_dim
from agc_triton.validation import check_grad, check_options, check_param


def unitwise_norm(tensor: Tensor, unit_dim: int | None = None) -> Tensor:
    """L2 norm of each unit, shaped to broadcast against ``tensor``.

    Args:
        tensor: real or complex, any shape.
        unit_dim: dimension that indexes units, None for 0; a tensor of squeezed rank <= 1 is one
            unit whatever it says.

    Returns:
        fp32 (fp64 for fp64 input); every dimension but the unit dimension has size 1.

    Raises:
        ValueError: ``unit_dim`` is out of range.
    """
    return unit_norms(tensor, norm_dims(tensor.shape, unit_dim))


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    clipping: float | None = 1e-2,
    agc_eps: float = 1e-3,
    *,
    unit_dim: int | None = None,
    backend: str = "auto",
) -> None:
    """Clip ``.grad`` in place, unit by unit; parameters without a gradient are skipped.

    Each unit's gradient norm is held to ``clipping * max(||w||, agc_eps)`` (Brock et al. 2021,
    arXiv 2102.06171, equation 3). A unit at or under its limit keeps its bits.

    Args:
        parameters: a tensor or an iterable of tensors.
        clipping, agc_eps, unit_dim, backend: as in `agc_triton.AdamW_AGC`.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
        RuntimeError: a gradient that cannot be clipped; none has been changed then.
    """
    dispatch.check_backend(backend)
    check_options({"clipping": clipping, "agc_eps": agc_eps, "unit_dim": unit_dim}, "")
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if clipping:
        clip_grads_(params, Clip(clipping, agc_eps, unit_dim), backend, "parameter {}".format)


def clip_grads_(
    params: Sequence[Tensor], clip: Clip, backend: str, name: Callable[[int], str]
) -> None:
    """Check all gradients, then clip them in place; ``name(i)`` is what messages call params[i]."""
    given = [(i, p, p.grad) for i, p in enumerate(params) if p.grad is not None]
    for i, param, grad in given:
        check_param(param, clip.unit_dim, name(i))
        check_grad(param, grad, name(i))
        if grad.layout is not torch.strided:
            _check_sparse_rows(param, grad, clip, name(i))
    for _, param, grad in given:
        if grad.layout is torch.strided:
            clip_grad_(param, grad, clip)
        else:
            _clip_sparse_rows_(param, grad, clip)


def _check_sparse_rows(param: Tensor, grad: Tensor, clip: Clip, name: str) -> None:
    if (
        grad.layout is not torch.sparse_coo
        or param.dim() != 2
        or grad.sparse_dim() != 1
        or resolve_unit_dim(param.shape, clip.unit_dim) not in (None, 0)
    ):
        raise RuntimeError(
            f"the sparse gradient of {name} cannot be clipped: only row-sparse COO gradients of"
            " rank-2 parameters with unit_dim 0 can; use a dense gradient or clipping=0"
        )


def _clip_sparse_rows_(param: Tensor, grad: Tensor, clip: Clip) -> None:
    """Clip a row-sparse gradient, each row present against its row of the parameter."""
    if not grad.is_coalesced():
        grad = param.grad = grad.coalesce()
    values = grad.values()
    if resolve_unit_dim(param.shape, clip.unit_dim) is None:
        weight, dims = param, norm_dims(param.shape, None)
    else:
        weight, dims = param[grad.indices()[0]], (1,)
    values.mul_(clip_factors(unit_norms(weight, dims), unit_norms(values, dims), clip))
