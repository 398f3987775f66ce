"""Unit norms and clip factors in torch; kernels/norms.py is the same on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.records import Recording, Units
from agc_triton.units import UnitDim, unfolded, unit_axes

# Gradient norms are not taken for smaller than this when they divide (the authors' code).
SMALLEST = 1e-6

ZERO, ONE = torch.zeros((), device="cpu"), torch.ones((), device="cpu")


class Clip(NamedTuple):
    """The AGC settings of one parameter group: limit = clipping * max(||w||, agc_eps).

    With ``skip`` units whose gradient norm is not finite are left alone, with ``track`` all ratios
    of norms are kept.
    """

    clipping: float
    agc_eps: float
    unit_dim: UnitDim = None
    skip: bool = False
    track: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any], recording: Recording | None = None) -> Clip:
        """The settings in a group; without clipping the limit is infinite."""
        own = group["clipping"] or math.inf, group["agc_eps"], group["unit_dim"]
        if recording is None:
            return cls(*own)
        return cls(*own, recording.skip, recording.number is not None)


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 and complex128, fp32 for everything narrower."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def as_computed(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient of another dtype than its parameter's, in what that is clipped and updated in."""
    if grad.dtype == param.dtype:
        return grad
    dtype = norm_dtype(param.dtype)
    return grad.to(dtype.to_complex() if param.is_complex() else dtype)


def unit_norms(tensor: Tensor, unit_dim: UnitDim) -> Tensor:
    """The L2 norm of each unit, accumulated in `norm_dtype`.

    They lie as in the tensor `unfolded`, all other dimensions of size 1; see `spread`.

    Raises:
        ValueError: ``unit_dim`` does not fit the shape.
    """
    shape, dims = unfolded(tensor.shape, unit_dim)
    return norms_over(tensor if shape == tensor.shape else tensor.reshape(shape), dims)


def spread(values: Tensor, shape: torch.Size, unit_dim: UnitDim) -> Tensor:
    """A value per unit, shaped to broadcast against the tensor that `unit_norms` was asked for."""
    for dim, parts in unit_axes(shape, unit_dim):
        if parts != shape[dim]:  # two dimensions there, of the parts and of what lies in each
            values = values.repeat_interleave(shape[dim] // parts, dim).squeeze(dim + 1)
    return values


def norms_over(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """L2 norms over ``dims``, kept as size 1, accumulated in `norm_dtype`."""
    if tensor.dtype == torch.complex32:  # its moduli and norms would be fp16
        tensor = tensor.to(torch.complex64)
    if not dims:
        return tensor.abs().to(norm_dtype(tensor.dtype))
    dtype = None if tensor.is_complex() else norm_dtype(tensor.dtype)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=dtype)
    return norms


def clip_factors(p_norm: Tensor, g_norm: Tensor, clip: Clip, units: Units | None = None) -> Tensor:
    """What each unit's gradient is multiplied with: 1 up to the limit, limit / ||g|| above it.

    Source: Brock et al. 2021 (arXiv 2102.06171), equation 3. Where a norm is NaN it is 1. A unit to
    be skipped has the factor NaN, which no other has. ``units`` are their records, where there are
    any. ``p_norm`` may be overwritten.
    """
    g_norm = g_norm.to(p_norm.dtype)
    if clip.track:
        assert units is not None
        units.track(p_norm, g_norm, clip.agc_eps)
    if clip.clipping * clip.agc_eps >= 2 * SMALLEST and _is_plain(p_norm):
        # No norm over such a limit needs the guard, so NaN and infinity are all there is to mind:
        # the same numbers in fewer operations, each of which costs a block microseconds.
        limited = p_norm.clamp_(min=clip.agc_eps)
        factors = torch.addcdiv(ZERO, limited, g_norm, value=clip.clipping)
        torch.fmin(factors, ONE, out=factors)
    else:
        limit = p_norm.clamp(min=clip.agc_eps).mul_(clip.clipping)
        factors = torch.where(g_norm > limit, limit / g_norm.clamp(min=SMALLEST), 1.0)
    if clip.skip:
        assert units is not None
        factors.masked_fill_(units.skip(g_norm), torch.nan)
    return factors


def _is_plain(norms: Tensor) -> bool:
    return type(norms) is Tensor and norms.is_cpu and not torch.is_grad_enabled()


def row_norms(param: Tensor, grad: Any, unit_dim: UnitDim) -> tuple[Tensor, Tensor]:
    """Norms of the rows that a coalesced row-sparse gradient has, of the parameter and of it."""
    weight, dims = param, tuple(range(2))
    if unit_axes(param.shape, unit_dim):
        weight, dims = param[grad.indices()[0]], (1,)
    return norms_over(weight, dims), norms_over(grad.values(), dims)


def clipped_rows_(param: Tensor, grad: Any, clip: Clip, units: Units | None) -> Tensor:
    """A row-sparse gradient, each row that is there clipped against its row of the parameter.

    It is clipped in place where it is coalesced, else a copy of it is. ``units`` are the records of
    all rows, where there are any.
    """
    coalesced: Tensor = grad if grad.is_coalesced() else grad.coalesce()
    own = units and units.of_rows(coalesced.indices()[0])
    factors = clip_factors(*row_norms(param, coalesced, clip.unit_dim), clip, own)
    coalesced.values().mul_(factors)
    return coalesced
