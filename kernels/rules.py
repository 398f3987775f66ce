"""One update rule per optimizer: what is prepared for a whole tensor, and one element's update.

``NAME_prepare(raw, scalars)`` turns a parameter group's raw values (fp64 blocks over tensors, in
the order of the optimizer's ``hyper``) and the rule's scalars before the step (fp32 blocks) into
the numbers that ``NAME(p, g, states, h, FLAGS)`` reads as ``h``, and the scalars after it. ``g`` is
clipped, unscaled and negated for maximize. The rules follow torch.optim 2.13.
"""

import triton
import triton.language as tl

SGD_MOMENTUM = tl.constexpr(1)
SGD_NESTEROV = tl.constexpr(2)
ADAM_AMSGRAD = tl.constexpr(1)
RMSPROP_CENTERED = tl.constexpr(1)
RMSPROP_MOMENTUM = tl.constexpr(2)


@triton.jit
def decayed(g, p, weight_decay):
    """The gradient with L2 decay; without any, an infinite weight does not make it NaN."""
    return g + weight_decay * tl.where(weight_decay == 0.0, 0.0, p)


@triton.jit
def sgd_prepare(raw, scalars):
    """Momentum, weight of the new gradient, weight decay, lr; steps made."""
    lr, momentum, dampening, weight_decay = raw[0], raw[1], raw[2], raw[3]
    step = scalars[0] + 1.0
    # The momentum buffer starts as the first gradient, without dampening.
    keep = tl.where(step == 1.0, 1.0, 1.0 - dampening)
    return (momentum, keep, weight_decay, lr), (step,)


@triton.jit
def sgd(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.SGD: L2 decay, momentum with dampening, Nesterov."""
    g = decayed(g, p, h[2])
    new_states = ()
    if SGD_MOMENTUM & FLAGS:
        momentum_buffer = h[0] * states[0] + h[1] * g
        new_states = (momentum_buffer,)
        if SGD_NESTEROV & FLAGS:
            g = g + h[0] * momentum_buffer
        else:
            g = momentum_buffer
    return p - h[3] * g, new_states


@triton.jit
def adam_prepare(raw, scalars):
    """1 - beta1, beta2, 1 - beta2, L2, decay factor, step size, 1 / sqrt(correction), eps; step."""
    lr, beta1, beta2, eps, weight_decay = raw[0], raw[1], raw[2], raw[3], raw[4]
    decoupled = raw[5]
    step = scalars[0] + 1.0
    bias_correction1 = 1.0 - tl.exp2(step.to(tl.float64) * tl.log2(beta1))
    bias_correction2 = 1.0 - tl.exp2(step.to(tl.float64) * tl.log2(beta2))
    prepared = (
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        weight_decay * (1.0 - decoupled),
        1.0 - lr * weight_decay * decoupled,
        lr / bias_correction1,
        1.0 / tl.sqrt(bias_correction2),
        eps,
    )
    return prepared, (step,)


@triton.jit
def adam(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.Adam and AdamW, with or without amsgrad."""
    g = decayed(g, p, h[3])
    exp_avg = states[0] + h[0] * (g - states[0])
    exp_avg_sq = h[1] * states[1] + h[2] * g * g
    new_states = (exp_avg, exp_avg_sq)
    second = exp_avg_sq
    if ADAM_AMSGRAD & FLAGS:
        second = tl.maximum(states[2], exp_avg_sq, tl.PropagateNan.ALL)
        new_states = new_states + (second,)
    update = exp_avg / (tl.sqrt(second) * h[6] + h[7])
    return h[4] * p - h[5] * update, new_states


@triton.jit
def rmsprop_prepare(raw, scalars):
    """Alpha, 1 - alpha, eps, weight decay, momentum, lr; step."""
    lr, alpha, eps, weight_decay, momentum = raw[0], raw[1], raw[2], raw[3], raw[4]
    return (alpha, 1.0 - alpha, eps, weight_decay, momentum, lr), (scalars[0] + 1.0,)


@triton.jit
def rmsprop(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.RMSprop, centered or not, with or without momentum."""
    g = decayed(g, p, h[3])
    square_avg = h[0] * states[0] + h[1] * g * g
    new_states = (square_avg,)
    avg = square_avg
    if RMSPROP_CENTERED & FLAGS:
        grad_avg = states[1] + h[1] * (g - states[1])
        new_states = new_states + (grad_avg,)
        avg = square_avg - grad_avg * grad_avg
    update = g / (tl.sqrt(avg) + h[2])
    if RMSPROP_MOMENTUM & FLAGS:
        # After grad_avg, where there is one.
        update = h[4] * states[1 + (RMSPROP_CENTERED & FLAGS)] + update
        new_states = new_states + (update,)
    return p - h[5] * update, new_states


@triton.jit
def clip_prepare(raw, scalars):
    """Clipping alone prepares nothing."""
    return (), ()


@triton.jit
def clip(p, g, states, h, FLAGS: tl.constexpr):
    """The clipped gradient itself."""
    return g, ()
