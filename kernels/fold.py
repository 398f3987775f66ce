"""Adds up the parts of units that are split between ranks before they leave this one."""

import triton
import triton.language as tl

from agc_triton.kernels.layout import FOLD_FIELDS
from agc_triton.kernels.norms import sum_pairs


@triton.jit
def fold(sums_ptr, folds_ptr, own_ptr, PARTS: tl.constexpr):
    """One unit: its pairs of partial sums, of p and g, become one pair in an exchange."""
    fields = folds_ptr + tl.program_id(0).to(tl.int64) * FOLD_FIELDS
    first, parts, pair = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    part = tl.arange(0, PARTS)[None, :]
    part_ptr = sums_ptr + 2 * (first + part)
    p_parts = tl.load(part_ptr, mask=part < parts, other=0.0)
    g_parts = tl.load(part_ptr + 1, mask=part < parts, other=0.0)
    p_sum, g_sum = sum_pairs(p_parts, g_parts)
    at = tl.arange(0, 1)
    tl.store(own_ptr + 2 * pair + at, p_sum)
    tl.store(own_ptr + 2 * pair + 1 + at, g_sum)
