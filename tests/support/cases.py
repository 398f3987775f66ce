"""What the tests of the torch path run through: optimizers, options, modes, checked steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import agc_triton
from tests.support.helpers import random_grad, same
from tests.support.oracle import Oracle
from tests.support.tolerances import TOLERANCES

Kwargs = Mapping[str, Any]
NAMES = ("SGD", "Adam", "AdamW", "RMSprop")
CLIPPING = 0.05  # about half of the units below are over it

# Learning rates are large: an update as large as its parameter hides no error behind it.
_ADAM: dict[str, Kwargs] = {
    "plain": {"lr": 0.5},
    "defaults": {},
    "weight_decay": {"lr": 0.5, "weight_decay": 0.1},
    "amsgrad": {"lr": 0.5, "weight_decay": 0.1, "amsgrad": True},
    "maximize": {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
    "betas, eps": {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3},
    "Tensor lr": {"lr": torch.tensor(0.5), "weight_decay": 0.1},
    "Tensor lr of shape (1,), betas": {
        "lr": torch.tensor([0.5]),
        "betas": (torch.tensor([[0.8]]), torch.tensor(0.9)),
        "amsgrad": True,
    },
}
OPTIONS: dict[str, dict[str, Kwargs]] = {
    "SGD": {
        "plain": {"lr": 0.5},
        "defaults": {},
        "weight_decay": {"lr": 0.5, "weight_decay": 0.1},
        "momentum": {"lr": 0.5, "momentum": 0.9},
        "dampening": {"lr": 0.5, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
        "nesterov": {"lr": 0.5, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "maximize": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        "Tensor lr": {"lr": torch.tensor(0.5), "momentum": 0.9, "weight_decay": 0.1},
        "Tensor lr of shape (1,)": {"lr": torch.tensor([0.5])},
    },
    "Adam": {
        **_ADAM,
        "decoupled": {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
    },
    "AdamW": _ADAM,
    "RMSprop": {
        "plain": {"lr": 0.5},
        "defaults": {},
        "weight_decay": {"lr": 0.5, "weight_decay": 0.1},
        "alpha, eps": {"lr": 0.5, "alpha": 0.5, "eps": 1e-3},
        "momentum": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1},
        "centered": {"lr": 0.5, "centered": True, "weight_decay": 0.1},
        "everything": {"lr": 0.5, "centered": True, "momentum": 0.9, "maximize": True},
        "L2 on momentum": {"lr": 0.5, "momentum": 0.9, "maximize": True, "weight_decay": 0.1},
        "alpha 0": {"lr": 0.5, "alpha": 0.0, "eps": 1e-3},
        "alpha 1": {"lr": 0.5, "alpha": 1.0, "eps": 10.0},
        "Tensor lr": {"lr": torch.tensor(0.5), "weight_decay": 0.1},
        "Tensor lr of shape (1,)": {"lr": torch.tensor([0.5]), "momentum": 0.9},
    },
}
# For what does not depend on the rule: every state there is.
STATEFUL: dict[str, Kwargs] = {
    "SGD": OPTIONS["SGD"]["nesterov"],
    "Adam": OPTIONS["Adam"]["amsgrad"],
    "AdamW": OPTIONS["AdamW"]["amsgrad"],
    "RMSprop": OPTIONS["RMSprop"]["everything"],
}
MODES: dict[str, Kwargs] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "not fused": {"fused": False},
    "differentiable": {"differentiable": True},
}


def supported(name: str, options: Kwargs, mode: str) -> bool:
    """Whether torch.optim takes this combination."""
    if name == "RMSprop":
        return "fused" not in mode
    tensors = isinstance(options.get("lr"), Tensor) and name != "SGD"
    return not (tensors and mode == "foreach")


def build(name: str, params: Any, options: Kwargs, mode: str = "default") -> Optimizer:
    """The AGC class of a torch.optim name."""
    optimizer: Optimizer = getattr(agc_triton, f"{name}_AGC")(params, **options, **MODES[mode])
    return optimizer


def tolerance_key(dtype: torch.dtype, name: str, options: Kwargs, mode: str) -> str:
    """The entry of the tolerance table that says how this combination rounds."""
    kind = str(dtype.to_real()).removeprefix("torch.")
    if kind in ("float32", "float64"):
        on_device = mode == "differentiable" or isinstance(options.get("lr"), Tensor)
        return f"{kind}, scalars on the device" if on_device and name.startswith("Adam") else kind
    # RMSprop has no fused kernel; SGD's is wrong for 16 bits up to torch 2.13 (pytorch#191763).
    fused = mode in ("default", "fused") and name.startswith("Adam")
    return kind if fused else f"{kind}, operation by operation"


STATEFUL_CASES = [
    (name, mode) for name in NAMES for mode in MODES if supported(name, STATEFUL[name], mode)
]


def randn(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal, the same numbers in each dtype."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=rng, dtype=wide).to(dtype)


def make_grad(weight: Tensor, seed: int) -> Tensor:
    """A gradient whose rows differ by decades; complex where the weight is."""
    if not weight.is_complex():
        return random_grad(weight, seed)
    parts = [random_grad(weight.real, 2 * seed + part) for part in range(2)]
    return torch.complex(*parts)


def in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, with the dimensions in memory from the first of ``order`` to the last."""
    inverse = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(tuple(order)).contiguous().permute(inverse)


def make_grads(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Gradients in the memory order of their parameters, as autograd leaves them."""
    orders = [sorted(range(p.dim()), key=p.stride, reverse=True) for p in params]
    grads = [make_grad(p, 100 * step + i) for i, p in enumerate(params)]
    return [in_order(grad, order) for grad, order in zip(grads, orders, strict=True)]


def states_of(optimizer: Optimizer, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The state of each parameter, empty where there is none."""
    return [optimizer.state.get(param, {}) for param in params]


def step_with(
    optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """One step; gradients must stay what they are, bit for bit and in place."""
    kept = [None if grad is None else (grad.clone(), grad.data_ptr()) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    for param, grad, before in zip(params, grads, kept, strict=True):
        assert param.grad is grad
        if grad is not None and before is not None:
            assert same(grad, before[0])
            assert grad.data_ptr() == before[1]


def step_and_check(
    optimizer: Optimizer, oracle: Oracle, params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """One step of both, compared."""
    oracle.step(grads)
    step_with(optimizer, params, grads)
    oracle.check(params, states_of(optimizer, params))


def check_steps(
    name: str,
    mode: str,
    params: Sequence[Tensor],
    grads: Callable[[Sequence[Tensor], int], Sequence[Tensor]] = make_grads,
    between: Callable[[Any], None] = lambda optimizer: None,
    rounds_as: str | None = None,
    **agc: Any,
) -> None:
    """Two steps of parameters of one dtype, all states in use, against the oracle.

    ``between`` is called with the optimizer after each. ``rounds_as`` is the mode that has to be
    fallen back to where ``mode`` itself cannot do it.
    """
    dtype = params[0].dtype
    options: Kwargs = {**STATEFUL[name], "clipping": CLIPPING, **agc}
    if dtype.itemsize == 2:
        options = low_precision(name, options)
    tolerance = TOLERANCES[tolerance_key(dtype, name, options, rounds_as or mode)]
    optimizer = build(name, params, options, mode)
    oracle = Oracle(name, params, tolerance, **options)
    for step in range(2):
        if dtype.itemsize == 2:  # from the same rounded values, so that the bound is of one step
            oracle.load(params, states_of(optimizer, params))
        step_and_check(optimizer, oracle, params, grads(params, step))
        between(optimizer)


def low_precision(name: str, options: Kwargs) -> Kwargs:
    """With an eps that is not 0 in fp16; squares of small gradients are: no variance to center."""
    eps = {} if name == "SGD" else {"eps": 0.1}
    return {**options, **eps, **({"centered": False} if name == "RMSprop" else {})}
