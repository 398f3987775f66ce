"""The launch that opens a step: counts steps, prepares constants, sums parts of long units."""

import triton
import triton.language as tl

from agc_triton.kernels.layout import (
    ACTIVE,
    AGC_EPS,
    CLIPPING,
    DIRECTION,
    FIXED_VALUES,
    GRAD,
    INVERSE_SCALE,
    OF_RULE,
    PARAM,
    RULE_VALUES,
    SCALARS,
    TENSOR_FIELDS,
    TILE_FIELDS,
    element,
    row,
)
from agc_triton.kernels.norms import sum_pairs


@triton.jit
def _prepare(
    grad_scale_ptr,
    found_inf_ptr,
    addresses_ptr,
    groups_ptr,
    pointers_ptr,
    number,
    tensors_ptr,
    prepared_ptr,
    numbers_ptr,
    n_tensors,
    PREPARE: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_PREPARED: tl.constexpr,
    BLOCK: tl.constexpr,
    TRACK: tl.constexpr,
):
    """One prepared row per tensor; a tensor without gradient, or after an overflow, is idle."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_tensors
    active = mask & (tl.load(addresses_ptr + GRAD * n_tensors + i, mask=mask, other=0) != 0)
    active = active & (tl.load(found_inf_ptr + tl.zeros((BLOCK,), tl.int32)) == 0.0)
    scalar_ptrs, scalars = (), ()
    for k in tl.static_range(N_SCALARS):
        address = tl.load(addresses_ptr + (SCALARS + k) * n_tensors + i, mask=mask, other=0)
        scalar_ptr = address.to(tl.pointer_type(tl.float32))
        scalar_ptrs = scalar_ptrs + (scalar_ptr,)
        scalars = scalars + (tl.load(scalar_ptr, mask=mask, other=0.0),)
    group = tl.load(tensors_ptr + i * TENSOR_FIELDS + 3, mask=mask, other=0)
    raw_ptr = groups_ptr + group * (FIXED_VALUES + RULE_VALUES)
    raw = ()
    for k in tl.static_range(RULE_VALUES):
        value = tl.load(raw_ptr + FIXED_VALUES + k, mask=mask, other=0.5)
        # Where a hyperparameter is a tensor on the device, and 0 elsewhere.
        address = tl.load(pointers_ptr + group * RULE_VALUES + k, mask=mask, other=0)
        given_ptr = address.to(tl.pointer_type(tl.float32))
        given = tl.load(given_ptr, mask=address != 0, other=0.0).to(tl.float64)
        raw = raw + (tl.where(address != 0, given, value),)
    prepared, scalars = PREPARE(raw, scalars)
    tl.static_assert(len(scalars) == N_SCALARS)
    tl.static_assert(len(prepared) == N_PREPARED)
    for k in tl.static_range(N_SCALARS):
        tl.store(scalar_ptrs[k], scalars[k], mask=active)
    if TRACK:
        tl.store(numbers_ptr + i, tl.full((BLOCK,), number, tl.int32), mask=active)
    inverse = tl.full((BLOCK,), 1.0, tl.float64) / tl.load(grad_scale_ptr).to(tl.float64)
    out = prepared_ptr + i * (OF_RULE + N_PREPARED)
    tl.store(out + ACTIVE, tl.where(active, 1.0, 0.0).to(tl.float64), mask=mask)
    tl.store(out + CLIPPING, tl.load(raw_ptr, mask=mask, other=0.0), mask=mask)
    tl.store(out + AGC_EPS, tl.load(raw_ptr + 1, mask=mask, other=0.0), mask=mask)
    tl.store(out + INVERSE_SCALE, inverse, mask=mask)
    sign = tl.load(raw_ptr + 2, mask=mask, other=1.0)
    tl.store(out + DIRECTION, inverse * sign, mask=mask)
    for k in tl.static_range(N_PREPARED):
        tl.store(out + OF_RULE + k, prepared[k], mask=mask)


@triton.jit
def _sum_part(
    grad_scale_ptr,
    addresses_ptr,
    tile_ptr,
    tensors_ptr,
    sums_ptr,
    own_ptr,
    n_tensors,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """Sums of squares of p and g over one span of a unit, into a pair of its own.

    It is one of ``own_ptr``'s, which go over ranks, where that span is all of the unit here.
    """
    tensor, offset, start = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    fields = tensors_ptr + tensor * TENSOR_FIELDS
    length, inner, stride = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    end = tl.minimum(start + tl.load(fields + 4), length)
    inverse = (1.0 / tl.load(grad_scale_ptr).to(tl.float64)).to(COMPUTE)
    p_ptr = row(addresses_ptr, PARAM, n_tensors, tensor, offset, P_DTYPE, VECTOR)
    g_address = tl.load(addresses_ptr + GRAD * n_tensors + tensor)
    # Without a gradient here there may be one on another rank.
    g_end = tl.where(g_address != 0, end, 0)
    g_ptr = row(addresses_ptr, GRAD, n_tensors, tensor, offset, G_DTYPE, VECTOR)
    p_squares = tl.zeros((1, COLUMNS), COMPUTE)
    g_squares = tl.zeros((1, COLUMNS), COMPUTE)
    while start < end:
        start = tl.multiple_of(start, VECTOR)
        column = start + tl.arange(0, COLUMNS)[None, :]
        p_mask = column < tl.multiple_of(end, VECTOR)
        g_mask = column < tl.multiple_of(g_end, VECTOR)
        at = element(column, inner, stride, STRIDED)
        p = tl.load(p_ptr + at, mask=p_mask, other=0.0).to(COMPUTE)
        g = tl.load(g_ptr + at, mask=g_mask, other=0.0).to(COMPUTE) * inverse
        p_squares += p * p
        g_squares += g * g
        start += COLUMNS
    p_sum, g_sum = sum_pairs(p_squares, g_squares)
    pair = 2 * tl.load(tile_ptr + 4) + tl.arange(0, 1)
    if tl.load(tile_ptr + 3) == 1:
        sums_ptr = own_ptr
    tl.store(sums_ptr + pair, p_sum)
    tl.store(sums_ptr + 1 + pair, g_sum)


@triton.jit(do_not_specialize=["number", "n_tensors", "n_prepare"])
def begin(
    grad_scale_ptr,
    found_inf_ptr,
    addresses_ptr,
    groups_ptr,
    pointers_ptr,
    number,
    tensors_ptr,
    prepared_ptr,
    tiles_ptr,
    sums_ptr,
    own_ptr,
    numbers_ptr,
    n_tensors,
    n_prepare,
    PREPARE: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_PREPARED: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    STRIDED: tl.constexpr,
    HAS_SPLIT: tl.constexpr,
    TRACK: tl.constexpr,
):
    """The first ``n_prepare`` programs prepare ``BLOCK`` tensors each, the others sum one span.

    With ``TRACK`` the step's ``number`` goes to ``numbers_ptr`` (int32) of tensors it updates.
    """
    if tl.program_id(0) < n_prepare:
        _prepare(
            grad_scale_ptr,
            found_inf_ptr,
            addresses_ptr,
            groups_ptr,
            pointers_ptr,
            number,
            tensors_ptr,
            prepared_ptr,
            numbers_ptr,
            n_tensors,
            PREPARE,
            N_SCALARS,
            N_PREPARED,
            BLOCK,
            TRACK,
        )
    elif HAS_SPLIT:
        _sum_part(
            grad_scale_ptr,
            addresses_ptr,
            tiles_ptr + (tl.program_id(0) - n_prepare).to(tl.int64) * TILE_FIELDS,
            tensors_ptr,
            sums_ptr,
            own_ptr,
            n_tensors,
            P_DTYPE,
            G_DTYPE,
            COMPUTE,
            COLUMNS,
            VECTOR,
            STRIDED,
        )
