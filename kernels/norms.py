"""Unit norms and the clip factor, as device functions shared by every kernel."""

import triton
import triton.language as tl


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def sum_pairs(a, b):
    """Row sums of two (rows, columns) blocks in one tree reduction of fixed order."""
    return tl.reduce((a, b), 1, _add_pairs)


@triton.jit
def _weight_norm(p_squares, agc_eps):
    # A weight norm of NaN makes a limit of NaN, which nothing is over.
    return tl.maximum(tl.sqrt(p_squares), agc_eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clip_ratio(p_squares, g_squares, agc_eps):
    """||g|| / max(||w||, agc_eps), which is over ``clipping`` where a unit is clipped."""
    return tl.sqrt(g_squares) / _weight_norm(p_squares, agc_eps)


@triton.jit
def clip_factor(p_squares, g_squares, clipping, agc_eps):
    """1 where ||g|| <= limit = clipping * max(||w||, agc_eps), else limit / max(||g||, 1e-6)."""
    limit = clipping * _weight_norm(p_squares, agc_eps)
    g_norm = tl.sqrt(g_squares)
    # Constants are fp32 unless they are told otherwise.
    smallest = tl.full(g_norm.shape, 1e-6, g_norm.dtype)
    return tl.where(g_norm > limit, limit / tl.maximum(g_norm, smallest), 1.0)
