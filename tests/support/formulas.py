"""The rules of torch.optim as its documentation has them, by the names of its classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from agc_triton.optim import OPTIMIZERS
from tests.support.rounded import Rounded, exact

Options: TypeAlias = Mapping[str, Any]
State: TypeAlias = Mapping[str, Rounded]

# States of one element, kept in fp32 whatever the parameter's dtype is.
SCALARS = ("step", "mu_product", "mu", "eta")


def sgd(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.SGD's documented rule; a momentum buffer starts as its first gradient."""
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    if o["momentum"]:
        buffer = g
        if state:
            buffer = state["momentum_buffer"] * o["momentum"] + g * (1 - o["dampening"])
        state = {"momentum_buffer": buffer}
        g = g + buffer * o["momentum"] if o["nesterov"] else buffer
    return p - g * o["lr"], state


def adam(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.Adam's documented rule; decoupled weight decay makes it AdamW's."""
    zero, t = _start(p, state)
    one, lr, beta1, beta2 = (exact(x, o["scalars"]) for x in (1.0, o["lr"], *o["betas"]))
    if o["weight_decay"] and o.get("decoupled_weight_decay"):
        p = p * (one - lr * o["weight_decay"])
    elif o["weight_decay"]:
        g = g + p * o["weight_decay"]
    m = state.get("exp_avg", zero) * beta1 + g * (one - beta1)
    v = state.get("exp_avg_sq", zero) * beta2 + g * g * (one - beta2)
    new = {"step": _step(t), "exp_avg": m, "exp_avg_sq": v}
    if o["amsgrad"]:
        v = new["max_exp_avg_sq"] = state.get("max_exp_avg_sq", zero).maximum(v)
    denominator = v.sqrt() / (one - beta2**t).sqrt() + o["eps"]
    return p - m / denominator * (lr / (one - beta1**t)), new


def rmsprop(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.RMSprop's documented rule."""
    zero, t = _start(p, state)
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    v = state.get("square_avg", zero) * o["alpha"] + g * g * (1 - o["alpha"])
    new = {"step": _step(t), "square_avg": v}
    if o["centered"]:
        mean = state.get("grad_avg", zero) * o["alpha"] + g * (1 - o["alpha"])
        new["grad_avg"], v = mean, v - mean * mean
    update = g / (v.sqrt() + o["eps"])
    if o["momentum"]:
        update = state.get("momentum_buffer", zero) * o["momentum"] + update
        new["momentum_buffer"] = update
    return p - update * o["lr"], new


def adamw(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.AdamW's documented rule."""
    return adam(p, g, state, {**o, "decoupled_weight_decay": True})


def adagrad(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.Adagrad's documented rule."""
    zero, t = _start(p, state)
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    total = state.get("sum", zero + o["initial_accumulator_value"]) + g * g
    lr = exact(o["lr"], o["scalars"]) / (exact(t - 1, o["scalars"]) * o["lr_decay"] + 1.0)
    return p - g / (total.sqrt() + o["eps"]) * lr, {"step": _step(t), "sum": total}


def adadelta(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.Adadelta's documented rule."""
    zero, t = _start(p, state)
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    v = state.get("square_avg", zero) * o["rho"] + g * g * (1 - o["rho"])
    u = state.get("acc_delta", zero)
    delta = (u + o["eps"]).sqrt() / (v + o["eps"]).sqrt() * g
    u = u * o["rho"] + delta * delta * (1 - o["rho"])
    return p - delta * o["lr"], {"step": _step(t), "square_avg": v, "acc_delta": u}


def adamax(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.Adamax's documented rule."""
    zero, t = _start(p, state)
    one, lr, beta1, beta2 = (exact(x, o["scalars"]) for x in (1.0, o["lr"], *o["betas"]))
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    m = state.get("exp_avg", zero) * beta1 + g * (one - beta1)
    u = (state.get("exp_inf", zero) * beta2).maximum(g.abs() + o["eps"])
    new = {"step": _step(t), "exp_avg": m, "exp_inf": u}
    return p - m / u * (lr / (one - beta1**t)), new


def nadam(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.NAdam's documented rule; the product of mu is kept in fp32."""
    zero, t = _start(p, state)
    one, lr, beta1, beta2 = (exact(x, o["scalars"]) for x in (1.0, o["lr"], *o["betas"]))
    mu, mu_next = (beta1 * (1.0 - 0.5 * 0.96 ** (at * o["momentum_decay"])) for at in (t, t + 1.0))
    product = state.get("mu_product", exact(1.0, torch.float32)) * mu
    if o["weight_decay"] and o["decoupled_weight_decay"]:
        p = p * (one - lr * o["weight_decay"])
    elif o["weight_decay"]:
        g = g + p * o["weight_decay"]
    m = state.get("exp_avg", zero) * beta1 + g * (one - beta1)
    v = state.get("exp_avg_sq", zero) * beta2 + g * g * (one - beta2)
    new = {"step": _step(t), "mu_product": product, "exp_avg": m, "exp_avg_sq": v}
    product = product.to(o["scalars"])
    of_g, of_m = (one - mu) / (one - product), mu_next / (one - product * mu_next)
    denominator = (v / (one - beta2**t)).sqrt() + o["eps"]
    return p - g / denominator * (lr * of_g) - m / denominator * (lr * of_m), new


def radam(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.RAdam's documented rule; of its scalars lr alone may be a tensor."""
    zero, t = _start(p, state)
    one, beta1, beta2 = (exact(x, torch.float64) for x in (1.0, *o["betas"]))
    lr = exact(o["lr"], o["scalars"])
    if o["weight_decay"] and o["decoupled_weight_decay"]:
        p = p * (exact(1.0, o["scalars"]) - lr * o["weight_decay"])
    elif o["weight_decay"]:
        g = g + p * o["weight_decay"]
    m = state.get("exp_avg", zero) * beta1 + g * (one - beta1)
    v = state.get("exp_avg_sq", zero) * beta2 + g * g * (one - beta2)
    new = {"step": _step(t), "exp_avg": m, "exp_avg_sq": v}
    rho_inf = exact(2.0, torch.float64) / (one - beta2) - 1.0
    rho = rho_inf - beta2**t * (2 * t) / (one - beta2**t)
    update = m / (one - beta1**t) * lr
    if rho.value > 5:
        ratio = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
        update = update * ((one - beta2**t).sqrt() * ratio.sqrt()) / (v.sqrt() + o["eps"])
    return p - update, new


def asgd(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.ASGD (Polyak and Juditsky 1992); eta and mu are kept in fp32."""
    zero, t = _start(p, state)
    one, lr = (exact(x, o["scalars"]) for x in (1.0, o["lr"]))
    eta = state.get("eta", exact(o["lr"], torch.float64).to(torch.float32))
    mu = state.get("mu", exact(1.0, torch.float32))
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    p = p * (one - eta.to(o["scalars"]) * o["lambd"]) - g * eta
    ax = state.get("ax", zero)
    new = {"step": _step(t), "ax": p if mu.value == 1 else ax + (p - ax) * mu}
    new["eta"] = (lr / (one + lr * o["lambd"] * t) ** o["alpha"]).to(torch.float32)
    new["mu"] = exact(1 / max(1.0, t - o["t0"]), torch.float64).to(torch.float32)
    return p, new


def rprop(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.Rprop's documented rule."""
    zero, t = _start(p, state)
    start = exact(np.full_like(p.value, o["lr"]), torch.float64).to(p.dtype)
    same = (g * state.get("prev", zero)).sign()
    etaminus, etaplus = o["etas"]
    factor = np.choose(same.value.astype(int) + 1, (etaminus, 1.0, etaplus))
    either = np.where(same.error > 0, etaplus - etaminus, 0.0)
    size = state.get("step_size", start) * Rounded(factor, either, torch.float64)
    least, most = o["step_sizes"]
    size = size.maximum(least).minimum(most)
    unsure = np.where(same.error > 0, np.abs(g.value), 0.0)
    g = Rounded(np.where(same.value < 0, 0.0, g.value), g.error + unsure, g.dtype)
    return p - g.sign() * size, {"step": _step(t), "prev": g, "step_size": size}


def _start(p: Rounded, state: State) -> tuple[Rounded, float]:
    """What states start as, and the number of the step to make."""
    t = float(state["step"].value) + 1.0 if state else 1.0
    return exact(np.zeros_like(p.value), p.dtype), t


def _step(t: float) -> Rounded:
    return exact(t, torch.float32)


RULES: dict[str, Callable[[Rounded, Rounded, State, Options], tuple[Rounded, State]]] = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": adamw,
    "RMSprop": rmsprop,
    "Adagrad": adagrad,
    "Adadelta": adadelta,
    "Adamax": adamax,
    "NAdam": nadam,
    "RAdam": radam,
    "ASGD": asgd,
    "Rprop": rprop,
}


def defaults(name: str) -> Options:
    """What a rule depends on, as torch's class has it."""
    cls = OPTIMIZERS[name].torch_class()
    modes = ("params", "foreach", "fused", "differentiable", "capturable")
    given = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in given if p.name not in modes}


def first_state(name: str, p: Tensor, o: Options) -> dict[str, Tensor]:
    """What a constructor makes: Adagrad's state is there before any gradient."""
    if name != "Adagrad":
        return {}
    start = o["initial_accumulator_value"]
    value = complex(start, start) if p.is_complex() else start
    return {"step": torch.zeros(()), "sum": torch.full_like(p, value)}
