"""The fused clip-and-update kernel, generic over the update rule."""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton for other GPUs
    gdc_launch_dependents = gdc_wait = None

from agc_triton.kernels.layout import (
    ACTIVE,
    AGC_EPS,
    CLIPPING,
    DIRECTION,
    GRAD,
    INVERSE_SCALE,
    OF_RULE,
    PARAM,
    SCALARS,
    TENSOR_FIELDS,
    TILE_FIELDS,
    element,
    row,
)
from agc_triton.kernels.norms import clip_factor, clip_ratio, sum_pairs


@triton.jit
def _load(ptr, mask, STREAM: tl.constexpr):
    """Read what is read once a step: with ``STREAM`` it leaves the caches first."""
    if STREAM:
        return tl.load(ptr, mask=mask, other=0.0, eviction_policy="evict_first")
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _store(ptrs, at, values, mask, STREAM: tl.constexpr):
    """Write results; all that a step writes but counts is rounded and stored here."""
    for k in tl.static_range(len(ptrs)):
        value = values[k].to(ptrs[k].dtype.element_ty)
        if STREAM:
            tl.store(ptrs[k] + at, value, mask=mask, cache_modifier=".cs")
        else:
            tl.store(ptrs[k] + at, value, mask=mask)


@triton.jit(do_not_specialize=["n_tensors"])
def step(
    addresses_ptr,
    tiles_ptr,
    tensors_ptr,
    prepared_ptr,
    sums_ptr,
    skips_ptr,
    ratios_ptr,
    n_tensors,
    RULE: tl.constexpr,
    FLAGS: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_PREPARED: tl.constexpr,
    N_STATES: tl.constexpr,
    TARGET: tl.constexpr,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    S_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
    STRIDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ACROSS: tl.constexpr,
    PARTS: tl.constexpr,
    PREFETCH: tl.constexpr,
    SKIP: tl.constexpr,
    TRACK: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """One tile: ``ROWS`` whole units of up to ``CHUNKS * COLUMNS`` elements, or a part of one.

    With ``ACROSS`` the units are split between ranks, and ``sums_ptr`` is what these added up.

    p, g and states are read once and written once; ``TARGET`` is the role that gets the rule's
    result. ``SKIP`` leaves units alone whose gradient's norm is not finite, and counts them in
    ``skips_ptr`` (int32); ``TRACK`` writes ||g|| / max(||w||, agc_eps) of each to ``ratios_ptr``.

    With ``PDL`` (programmatic dependent launch, sm_90) the launches of a step overlap, as no two
    write to the same memory. The first waits for `begin` before it lets the next one start, so
    that this one finds what was prepared; the others wait at their end, so that what comes after
    the last comes after all; and the last lets nobody start early.
    """
    if PDL:
        if FIRST:
            gdc_wait()
        if not LAST:
            gdc_launch_dependents()
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    tensor = tl.load(tile_ptr)
    prepared_ptr += tensor * (OF_RULE + N_PREPARED)
    if tl.load(prepared_ptr + ACTIVE) == 0.0:
        if PDL and not FIRST:
            gdc_wait()
        return
    offset = tl.load(tile_ptr + 1)
    fields = tensors_ptr + tensor * TENSOR_FIELDS
    length, inner, stride = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    start, units = tl.full((), 0, tl.int64), 1
    if SPLIT:
        start = tl.multiple_of(tl.load(tile_ptr + 2), VECTOR)
        if not STRIDED:
            offset += start
    else:
        units = tl.load(tile_ptr + 2).to(tl.int32)
    # Columns of this tile, in 32 bits: a tile is small however large its tensor is.
    limit = tl.minimum(length - start, CHUNKS * COLUMNS).to(tl.int32)
    limit = tl.multiple_of(limit, VECTOR)
    rows = tl.arange(0, ROWS)[:, None]
    if STRIDED:
        rows = rows.to(tl.int64) * inner
    else:
        rows = rows * limit

    p_ptr = row(addresses_ptr, PARAM, n_tensors, tensor, offset, P_DTYPE, VECTOR)
    g_ptr = row(addresses_ptr, GRAD, n_tensors, tensor, offset, G_DTYPE, VECTOR)
    state_ptrs = ()
    for s in tl.static_range(N_STATES):
        role = SCALARS + N_SCALARS + s
        state_ptrs = state_ptrs + (
            row(addresses_ptr, role, n_tensors, tensor, offset, S_DTYPE, VECTOR),
        )
    if TARGET == PARAM:
        out_ptrs = (p_ptr,) + state_ptrs
    else:
        out_ptrs = (g_ptr,) + state_ptrs

    inverse = tl.load(prepared_ptr + INVERSE_SCALE).to(COMPUTE)
    ps, gs, ats, masks = (), (), (), ()
    p_squares = tl.zeros((ROWS, COLUMNS), COMPUTE)
    g_squares = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for k in tl.static_range(CHUNKS):
        column = k * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (column < limit) & (tl.arange(0, ROWS)[:, None] < units)
        if STRIDED:
            at = rows + element(column + start, inner, stride, STRIDED)
        else:
            at = rows + column
        p, g = _load(p_ptr + at, mask, STREAM), _load(g_ptr + at, mask, STREAM)
        ps, gs, ats, masks = ps + (p,), gs + (g,), ats + (at,), masks + (mask,)
        if not SPLIT and not ACROSS:
            p_squares += p.to(COMPUTE) * p.to(COMPUTE)
            unscaled = g.to(COMPUTE) * inverse
            g_squares += unscaled * unscaled

    # Loads do not move up over the stores below, so the first states are asked for here.
    prefetched = ()
    for k in tl.static_range(PREFETCH):
        for s in tl.static_range(N_STATES):
            prefetched = prefetched + (_load(state_ptrs[s] + ats[k], masks[k], STREAM),)

    if ACROSS:
        unit = tl.arange(0, ROWS)
        pair_ptr = sums_ptr + 2 * (tl.load(tile_ptr + 4) + unit)
        p_sum = tl.load(pair_ptr, mask=unit < units, other=0.0)
        g_sum = tl.load(pair_ptr + 1, mask=unit < units, other=0.0)
    elif SPLIT:
        part = tl.arange(0, PARTS)[None, :]
        span = tl.load(fields + 4)
        part_ptr = sums_ptr + 2 * (tl.load(tile_ptr + 4) + part)
        there = part < (length + span - 1) // span
        p_parts = tl.load(part_ptr, mask=there, other=0.0)
        g_parts = tl.load(part_ptr + 1, mask=there, other=0.0)
        p_sum, g_sum = sum_pairs(p_parts, g_parts)
    else:
        p_sum, g_sum = sum_pairs(p_squares, g_squares)
    if SKIP:
        finite = g_sum < float("inf")
    clipping = tl.load(prepared_ptr + CLIPPING).to(COMPUTE)
    agc_eps = tl.load(prepared_ptr + AGC_EPS).to(COMPUTE)
    factor = clip_factor(p_sum, g_sum, clipping, agc_eps)
    if SKIP or TRACK:
        record = tl.load(tile_ptr + 3) + tl.arange(0, ROWS)
        # A unit's first tile keeps its record.
        recorded = tl.arange(0, ROWS) < tl.where(start == 0, units, 0)
    if TRACK:
        tl.store(ratios_ptr + record, clip_ratio(p_sum, g_sum, agc_eps), mask=recorded)
    factor = (factor * tl.load(prepared_ptr + DIRECTION).to(COMPUTE))[:, None]

    h = ()
    for k in tl.static_range(N_PREPARED):
        h = h + (tl.load(prepared_ptr + OF_RULE + k).to(COMPUTE),)
    for k in tl.static_range(CHUNKS):
        states = ()
        for s in tl.static_range(N_STATES):
            if k < PREFETCH:
                state = prefetched[k * N_STATES + s]
            else:
                state = _load(state_ptrs[s] + ats[k], masks[k], STREAM)
            states = states + (state.to(COMPUTE),)
        mask = masks[k]
        if SKIP:
            mask = mask & finite[:, None]
        result, states = RULE(ps[k].to(COMPUTE), gs[k].to(COMPUTE) * factor, states, h, FLAGS)
        _store(out_ptrs, ats[k], (result,) + states, mask, STREAM)
    if SKIP:
        bad = recorded & (finite == 0)
        skips = tl.load(skips_ptr + record, mask=bad, other=0)
        tl.store(skips_ptr + record, skips + 1, mask=bad)
    if PDL and not FIRST:
        gdc_wait()
