"""How kernels find their data: table rows, and elements of a unit."""

import triton
import triton.language as tl

# Addresses by role: parameters, gradients, step counts (fp32), states.
# A tile: tensor, offset of its first unit, units (first column in a split unit), first slot.
TILE_FIELDS = tl.constexpr(4)
# A tensor: length of a unit, inner, stride between inner runs, group, span of a part.
TENSOR_FIELDS = tl.constexpr(5)
# Constants per tensor: room for 16, what they are, and where the rule's own begin. DIRECTION is
# 1 / grad_scale, negative to maximize.
CONSTANTS = tl.constexpr(16)
ACTIVE = tl.constexpr(0)
CLIPPING = tl.constexpr(1)
AGC_EPS = tl.constexpr(2)
INVERSE_SCALE = tl.constexpr(3)
DIRECTION = tl.constexpr(4)
OF_RULE = tl.constexpr(5)


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
