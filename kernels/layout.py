"""How kernels find their data: table rows, and elements of a unit."""

import triton
import triton.language as tl

from agc_triton.kernels import abi

# Kernels read numbers of other modules only as constexpr.
PARAM = tl.constexpr(abi.PARAM)
GRAD = tl.constexpr(abi.GRAD)
SCALARS = tl.constexpr(abi.SCALARS)
TILE_FIELDS = tl.constexpr(abi.TILE_FIELDS)
TENSOR_FIELDS = tl.constexpr(abi.TENSOR_FIELDS)
FOLD_FIELDS = tl.constexpr(abi.FOLD_FIELDS)
FIXED_VALUES = tl.constexpr(abi.FIXED_VALUES)
RULE_VALUES = tl.constexpr(abi.RULE_VALUES)
ACTIVE = tl.constexpr(abi.ACTIVE)
CLIPPING = tl.constexpr(abi.CLIPPING)
AGC_EPS = tl.constexpr(abi.AGC_EPS)
INVERSE_SCALE = tl.constexpr(abi.INVERSE_SCALE)
DIRECTION = tl.constexpr(abi.DIRECTION)
OF_RULE = tl.constexpr(abi.OF_RULE)


@triton.jit
def row(addresses_ptr, role, n_tensors, tensor, offset, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointer to element ``offset`` of a tensor, with the alignment that the plan has checked."""
    address = tl.load(addresses_ptr + role * n_tensors + tensor)
    pointer = address.to(tl.pointer_type(DTYPE)) + offset
    # The promise must come after the cast and the offset, or the compiler does not see it.
    return tl.multiple_of(pointer, VECTOR * (DTYPE.primitive_bitwidth // 8))


@triton.jit
def element(column, inner, stride, STRIDED: tl.constexpr):
    """Where a unit's columns lie, counted from its first element."""
    if STRIDED:
        return (column // inner) * stride + column % inner
    return column
