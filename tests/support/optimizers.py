"""The optimizers, and the options and modes that tests run them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import agc_triton
from agc_triton import SGD_AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC

Kwargs = Mapping[str, Any]
PAIRS: dict[Any, Any] = {SGD: SGD_AGC, Adam: Adam_AGC, AdamW: AdamW_AGC, RMSprop: RMSprop_AGC}
OURS = tuple(PAIRS.values())
NAMES = ("SGD", "Adam", "AdamW", "RMSprop")
# One for each of the kernels' rules: Adam's is AdamW's, with one flag.
EACH_RULE = ("SGD", "AdamW", "RMSprop")
CLIPPING = 0.05  # about half of the units that tests have are over it
TRITON: Kwargs = {"clipping": CLIPPING, "backend": "triton"}

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")

# Learning rates are large: an update as large as its parameter hides no error behind it.
ADAMW: Kwargs = {"lr": 0.5, "weight_decay": 0.1}
MOMENTUM: Kwargs = {"lr": 0.5, "momentum": 0.9, "dampening": 0.4}


def options(name: str, device: str = "cpu") -> dict[str, Kwargs]:
    """By label, all that an optimizer's rule depends on; tensors are made anew on ``device``."""

    def tensor(value: Any) -> Tensor:
        return torch.tensor(value, device=device)

    if name == "SGD":
        return {
            "plain": {"lr": 0.5},
            "defaults": {},
            "weight_decay": {"lr": 0.5, "weight_decay": 0.1},
            "momentum": {"lr": 0.5, "momentum": 0.9},
            "dampening": {"lr": 0.5, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
            "nesterov": {"lr": 0.5, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            "maximize": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "Tensor lr": {"lr": tensor(0.5), "momentum": 0.9, "weight_decay": 0.1},
            "Tensor lr of shape (1,)": {"lr": tensor([0.5])},
        }
    if name == "RMSprop":
        return {
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
            "Tensor lr": {"lr": tensor(0.5), "weight_decay": 0.1},
            "Tensor lr of shape (1,)": {"lr": tensor([0.5]), "momentum": 0.9},
        }
    adam: dict[str, Kwargs] = {
        "plain": {"lr": 0.5},
        "defaults": {},
        "weight_decay": {"lr": 0.5, "weight_decay": 0.1},
        "amsgrad": {"lr": 0.5, "weight_decay": 0.1, "amsgrad": True},
        "maximize": {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
        "betas, eps": {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3},
        "Tensor lr": {"lr": tensor(0.5), "weight_decay": 0.1},
        "Tensor lr of shape (1,), betas": {
            "lr": tensor([0.5]),
            "betas": (tensor([[0.8]]), tensor(0.9)),
            "amsgrad": True,
        },
    }
    decoupled = {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True}
    return {**adam, "decoupled": decoupled} if name == "Adam" else adam


# For what does not depend on the rule: every state there is.
STATEFUL: dict[str, Kwargs] = {
    "SGD": options("SGD")["nesterov"],
    "Adam": options("Adam")["amsgrad"],
    "AdamW": options("AdamW")["amsgrad"],
    "RMSprop": options("RMSprop")["everything"],
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


STATEFUL_CASES = [
    (name, mode) for name in NAMES for mode in MODES if supported(name, STATEFUL[name], mode)
]


def low_precision(name: str, options: Kwargs) -> Kwargs:
    """With an eps that is not 0 in fp16; squares of small gradients are: no variance to center."""
    eps = {} if name == "SGD" else {"eps": 0.1}
    return {**options, **eps, **({"centered": False} if name == "RMSprop" else {})}


def stateful(name: str, dtype: torch.dtype = torch.float32) -> Kwargs:
    """Options with every state that a dtype can hold."""
    return low_precision(name, STATEFUL[name]) if dtype.itemsize == 2 else STATEFUL[name]


def build(name: str, params: Any, options: Kwargs, mode: str = "default") -> Optimizer:
    """The AGC class of a torch.optim name."""
    optimizer: Optimizer = getattr(agc_triton, f"{name}_AGC")(params, **options, **MODES[mode])
    return optimizer
