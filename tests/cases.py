"""The optimizers, option sets and modes that the tests of the torch path run through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import agc_triton
from tests.oracle import Oracle

Kwargs = Mapping[str, Any]
NAMES = ("SGD", "Adam", "AdamW", "RMSprop")

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
        "Tensor lr": {"lr": torch.tensor(0.5), "weight_decay": 0.1},
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


def step_and_check(
    optimizer: Optimizer, oracle: Oracle, params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> None:
    """One step of both, compared."""
    oracle.step(grads)
    step_with(optimizer, params, grads)
    oracle.check(params, [optimizer.state.get(p, {}) for p in params])


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
            assert torch.equal(grad, before[0])
            assert grad.data_ptr() == before[1]
