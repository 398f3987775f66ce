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
def power(base, exponent):
    """Of fp64 blocks."""
    return tl.exp2(exponent * tl.log2(base))


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
    bias_correction1 = 1.0 - power(beta1, step.to(tl.float64))
    bias_correction2 = 1.0 - power(beta2, step.to(tl.float64))
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
def adagrad_prepare(raw, scalars):
    """Step size, eps, weight decay; step."""
    lr, lr_decay, eps, weight_decay = raw[0], raw[1], raw[2], raw[3]
    step_size = lr / (1.0 + scalars[0].to(tl.float64) * lr_decay)
    return (step_size, eps, weight_decay), (scalars[0] + 1.0,)


@triton.jit
def adagrad(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.Adagrad."""
    g = decayed(g, p, h[2])
    total = states[0] + g * g
    return p - h[0] * (g / (tl.sqrt(total) + h[1])), (total,)


@triton.jit
def adadelta_prepare(raw, scalars):
    """Lr, rho, 1 - rho, eps, weight decay; step."""
    lr, rho, eps, weight_decay = raw[0], raw[1], raw[2], raw[3]
    return (lr, rho, 1.0 - rho, eps, weight_decay), (scalars[0] + 1.0,)


@triton.jit
def adadelta(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.Adadelta."""
    g = decayed(g, p, h[4])
    square_avg = h[1] * states[0] + h[2] * g * g
    delta = tl.sqrt(states[1] + h[3]) / tl.sqrt(square_avg + h[3]) * g
    acc_delta = h[1] * states[1] + h[2] * delta * delta
    return p - h[0] * delta, (square_avg, acc_delta)


@triton.jit
def adamax_prepare(raw, scalars):
    """1 - beta1, beta2, eps, weight decay, step size; step."""
    lr, beta1, beta2, eps, weight_decay = raw[0], raw[1], raw[2], raw[3], raw[4]
    step = scalars[0] + 1.0
    bias_correction = 1.0 - power(beta1, step.to(tl.float64))
    return (1.0 - beta1, beta2, eps, weight_decay, lr / bias_correction), (step,)


@triton.jit
def adamax(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.Adamax."""
    g = decayed(g, p, h[3])
    exp_avg = states[0] + h[0] * (g - states[0])
    exp_inf = tl.maximum(h[1] * states[1], tl.abs(g) + h[2], tl.PropagateNan.ALL)
    return p - h[4] * (exp_avg / exp_inf), (exp_avg, exp_inf)


@triton.jit
def nadam_prepare(raw, scalars):
    """As `adam_prepare`'s first five, weights of g and exp_avg, 1 / sqrt(correction), eps.

    And the step and mu_product after it.
    """
    lr, beta1, beta2, eps, weight_decay = raw[0], raw[1], raw[2], raw[3], raw[4]
    momentum_decay, decoupled = raw[5], raw[6]
    step = scalars[0] + 1.0
    t = step.to(tl.float64)
    base = tl.full(t.shape, 0.96, tl.float64)
    mu = beta1 * (1.0 - 0.5 * power(base, t * momentum_decay))
    mu_next = beta1 * (1.0 - 0.5 * power(base, (t + 1.0) * momentum_decay))
    # In fp32, as torch keeps it.
    mu_product = scalars[1] * mu.to(tl.float32)
    product = mu_product.to(tl.float64)
    prepared = (
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        weight_decay * (1.0 - decoupled),
        1.0 - lr * weight_decay * decoupled,
        lr * (1.0 - mu) / (1.0 - product),
        lr * mu_next / (1.0 - product * mu_next),
        1.0 / tl.sqrt(1.0 - power(beta2, t)),
        eps,
    )
    return prepared, (step, mu_product)


@triton.jit
def nadam(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.NAdam, its weight decay decoupled or not."""
    g = decayed(g, p, h[3])
    exp_avg = states[0] + h[0] * (g - states[0])
    exp_avg_sq = h[1] * states[1] + h[2] * g * g
    update = (h[5] * g + h[6] * exp_avg) / (tl.sqrt(exp_avg_sq) * h[7] + h[8])
    return h[4] * p - update, (exp_avg, exp_avg_sq)


@triton.jit
def radam_prepare(raw, scalars):
    """As `adam_prepare`'s first five, step size, rectification or 0 where there is none, eps; step.

    The rectification has the second moment's correction in it.
    """
    lr, beta1, beta2, eps, weight_decay = raw[0], raw[1], raw[2], raw[3], raw[4]
    decoupled = raw[5]
    step = scalars[0] + 1.0
    t = step.to(tl.float64)
    bias_correction1 = 1.0 - power(beta1, t)
    bias_correction2 = 1.0 - power(beta2, t)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * t * power(beta2, t) / bias_correction2
    ratio = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    rectified = rho > 5.0
    root = tl.sqrt(tl.where(rectified, ratio * bias_correction2, 0.0))
    prepared = (
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        weight_decay * (1.0 - decoupled),
        1.0 - lr * weight_decay * decoupled,
        lr / bias_correction1,
        root,
        eps,
    )
    return prepared, (step,)


@triton.jit
def radam(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.RAdam, its weight decay decoupled or not."""
    g = decayed(g, p, h[3])
    exp_avg = states[0] + h[0] * (g - states[0])
    exp_avg_sq = h[1] * states[1] + h[2] * g * g
    adaptive = tl.where(h[6] == 0.0, 1.0, h[6] / (tl.sqrt(exp_avg_sq) + h[7]))
    return h[4] * p - h[5] * (exp_avg * adaptive), (exp_avg, exp_avg_sq)


@triton.jit
def asgd_prepare(raw, scalars):
    """Eta, decay factor, mu, weight decay; step, and mu and eta for the next one."""
    lr, lambd, alpha, t0, weight_decay = raw[0], raw[1], raw[2], raw[3], raw[4]
    step = scalars[0] + 1.0
    t = step.to(tl.float64)
    mu, eta = scalars[1].to(tl.float64), scalars[2].to(tl.float64)
    next_mu = 1.0 / tl.maximum(t - t0, 1.0)
    next_eta = lr / power(1.0 + lambd * lr * t, alpha)
    prepared = (eta, 1.0 - lambd * eta, mu, weight_decay)
    return prepared, (step, next_mu.to(tl.float32), next_eta.to(tl.float32))


@triton.jit
def asgd(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.ASGD; its average is the parameter itself until it starts."""
    g = decayed(g, p, h[3])
    p = h[1] * p - h[0] * g
    return p, (tl.where(h[2] == 1.0, p, states[0] + h[2] * (p - states[0])),)


@triton.jit
def rprop_prepare(raw, scalars):
    """Etaminus, etaplus, the least and the largest step size; step."""
    return (raw[0], raw[1], raw[2], raw[3]), (scalars[0] + 1.0,)


@triton.jit
def rprop(p, g, states, h, FLAGS: tl.constexpr):
    """torch.optim.Rprop; what has changed its sign waits for a step."""
    sign = g * states[0]
    factor = tl.where(sign > 0.0, h[1], tl.where(sign < 0.0, h[0], sign + 1.0))
    size = tl.maximum(states[1] * factor, h[2], tl.PropagateNan.ALL)
    size = tl.minimum(size, h[3], tl.PropagateNan.ALL)
    g = tl.where(sign < 0.0, 0.0, g)
    # Of NaN neither is true.
    direction = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, g))
    return p - direction * size, (g, size)


@triton.jit
def clip_prepare(raw, scalars):
    """Clipping alone prepares nothing."""
    return (), ()


@triton.jit
def clip(p, g, states, h, FLAGS: tl.constexpr):
    """The clipped gradient itself."""
    return g, ()
