"""Lion's update for the kernels of agc_triton; imported where something takes the Triton path."""

import triton
import triton.language as tl


@triton.jit
def lion_prepare(raw, scalars):
    """Lr, the decay factor, beta1, beta2."""
    lr, beta1, beta2, weight_decay = raw[0], raw[1], raw[2], raw[3]
    return (lr, 1.0 - lr * weight_decay, beta1, beta2), ()


@triton.jit
def lion(p, g, states, h, FLAGS: tl.constexpr):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""
    blend = h[2] * states[0] + (1.0 - h[2]) * g
    # Of NaN neither is true.
    direction = tl.where(blend > 0.0, 1.0, tl.where(blend < 0.0, -1.0, blend))
    return h[1] * p - h[0] * direction, (h[3] * states[0] + (1.0 - h[3]) * g,)
