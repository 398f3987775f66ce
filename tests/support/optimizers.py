"""The optimizers, and the options and modes that tests run them with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from agc_triton.optim import OPTIMIZERS
from tests.support.formulas import defaults

Kwargs = Mapping[str, Any]
NAMES = tuple(OPTIMIZERS)
OURS: tuple[Any, ...] = tuple(OPTIMIZERS.values())
PAIRS: dict[Any, Any] = {cls.torch_class(): cls for cls in OURS}
TORCHS: dict[str, Any] = {name: cls.torch_class() for name, cls in OPTIMIZERS.items()}
# One for each of the kernels' rules: Adam's is AdamW's, with one flag.
EACH_RULE = tuple(name for name in NAMES if name != "Adam")
# One for each way through the paths: without steps, torch's fused kernels, one that is none of
# torch's, scalars of its own, states from the start. What depends on no rule is shown with these.
EACH_WAY = ("SGD", "AdamW", "RMSprop", "NAdam", "Adagrad")
CLIPPING = 0.05  # about half of the units that tests have are over it
TRITON: Kwargs = {"clipping": CLIPPING, "backend": "triton"}

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")

# Learning rates are large: an update as large as its parameter hides no error behind it.
ADAMW: Kwargs = {"lr": 0.5, "weight_decay": 0.1}
MOMENTUM: Kwargs = {"lr": 0.5, "momentum": 0.9, "dampening": 0.4}


def takes(name: str, *arguments: str) -> bool:
    """Whether torch's class has these arguments."""
    return inspect.signature(TORCHS[name]).parameters.keys() >= set(arguments)


def _adam(tensor: Callable[[Any], Tensor]) -> dict[str, Kwargs]:
    return {
        "amsgrad": {"lr": 0.5, "weight_decay": 0.1, "amsgrad": True},
        "betas, eps": {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3},
        "Tensor lr of shape (1,), betas": {
            "lr": tensor([0.5]),
            "betas": (tensor([[0.8]]), tensor(0.9)),
            "amsgrad": True,
        },
    }


# What an optimizer has beside what most have in common (`options`).
OWN: dict[str, Callable[[Callable[[Any], Tensor]], dict[str, Kwargs]]] = {
    "SGD": lambda tensor: {
        "momentum": {"lr": 0.5, "momentum": 0.9},
        "dampening": {"lr": 0.5, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
        "nesterov": {"lr": 0.5, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "maximize": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        "Tensor lr": {"lr": tensor(0.5), "momentum": 0.9, "weight_decay": 0.1},
        "Tensor lr of shape (1,)": {"lr": tensor([0.5])},
    },
    "Adam": lambda tensor: {
        **_adam(tensor),
        "decoupled": {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
    },
    "AdamW": _adam,
    "RMSprop": lambda tensor: {
        "alpha, eps": {"lr": 0.5, "alpha": 0.5, "eps": 1e-3},
        "momentum": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1},
        "centered": {"lr": 0.5, "centered": True, "weight_decay": 0.1},
        "everything": {"lr": 0.5, "centered": True, "momentum": 0.9, "maximize": True},
        "L2 on momentum": {"lr": 0.5, "momentum": 0.9, "maximize": True, "weight_decay": 0.1},
        "alpha 0": {"lr": 0.5, "alpha": 0.0, "eps": 1e-3},
        "alpha 1": {"lr": 0.5, "alpha": 1.0, "eps": 10.0},
        "Tensor lr of shape (1,)": {"lr": tensor([0.5]), "momentum": 0.9},
    },
    "Adagrad": lambda tensor: {
        "lr_decay": {"lr": 0.5, "lr_decay": 0.5, "weight_decay": 0.1},
        "started": {"lr": 0.5, "initial_accumulator_value": 0.5, "eps": 1e-3},
    },
    "Adadelta": lambda tensor: {"rho, eps": {"lr": 0.5, "rho": 0.5, "eps": 1e-3}},
    "Adamax": lambda tensor: {"betas, eps": {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-2}},
    "NAdam": lambda tensor: {
        "decoupled": {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
        "momentum_decay": {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3, "momentum_decay": 1.0},
    },
    "RAdam": lambda tensor: {
        "decoupled": {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
        "betas, eps": {"lr": 0.5, "betas": (0.5, 0.875), "eps": 1e-3},
    },
    "ASGD": lambda tensor: {
        "averaging": {"lr": 0.5, "lambd": 0.1, "alpha": 0.5, "t0": 0.0, "weight_decay": 0.1},
        "late average": {"lr": 0.5, "lambd": 0.1, "t0": 2.0},
    },
    "Rprop": lambda tensor: {
        "etas": {"lr": 0.5, "etas": (0.25, 1.5)},
        "step_sizes": {"lr": 0.5, "step_sizes": (0.4, 0.55)},
    },
}
# Steps until a rule has taken all of its ways: RAdam rectifies from the sixth on.
STEPS = {"RAdam": 6}


def options(name: str, device: str = "cpu") -> dict[str, Kwargs]:
    """By label, all that an optimizer's rule depends on; tensors are made anew on ``device``.

    What this torch's class does not take is left out: Adam's decoupled_weight_decay in 2.6.
    """

    def tensor(value: Any) -> Tensor:
        return torch.tensor(value, device=device)

    decay = {"weight_decay": 0.1} if "weight_decay" in defaults(name) else {}
    common: dict[str, Kwargs] = {
        "plain": {"lr": 0.5},
        "defaults": {},
        "weight_decay": {"lr": 0.5, **decay},
        "maximize": {"lr": 0.5, **decay, "maximize": True},
        "Tensor lr": {"lr": tensor(0.5), **decay},
    }
    labelled = {**common, **OWN[name](tensor)}
    return {label: given for label, given in labelled.items() if takes(name, *given)}


# For what does not depend on the rule: every state there is.
STATEFUL: dict[str, Kwargs] = {
    "SGD": options("SGD")["nesterov"],
    "Adam": options("Adam")["amsgrad"],
    "AdamW": options("AdamW")["amsgrad"],
    "RMSprop": options("RMSprop")["everything"],
    "Adagrad": options("Adagrad")["lr_decay"],
    "Adadelta": options("Adadelta")["weight_decay"],
    "Adamax": options("Adamax")["weight_decay"],
    "NAdam": options("NAdam")["decoupled"],
    "RAdam": options("RAdam")["decoupled"],
    "ASGD": options("ASGD")["averaging"],
    "Rprop": options("Rprop")["etas"],
}
MODES: dict[str, Kwargs] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "not fused": {"fused": False},
    "differentiable": {"differentiable": True},
}


def takes_more_later(name: str) -> bool:
    """Whether torch's class steps what is added after its construction; Adagrad did not in 2.6."""
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = TORCHS[name]([first])
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones_like(second)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


def supported(name: str, options: Kwargs, mode: str) -> bool:
    """Whether torch.optim takes this combination."""
    if not takes(name, "fused") and "fused" in mode:
        return False
    tensors = isinstance(options.get("lr"), Tensor) and name in ("Adam", "AdamW")
    return not (tensors and mode == "foreach")


STATEFUL_CASES = [
    (name, mode) for name in NAMES for mode in MODES if supported(name, STATEFUL[name], mode)
]
WAY_CASES = [case for case in STATEFUL_CASES if case[0] in EACH_WAY]


def low_precision(name: str, options: Kwargs) -> Kwargs:
    """With an eps that is not 0 in fp16; squares of small gradients are: no variance to center."""
    eps = {"eps": 0.1} if "eps" in defaults(name) else {}
    return {**options, **eps, **({"centered": False} if name == "RMSprop" else {})}


def stateful(name: str, dtype: torch.dtype = torch.float32) -> Kwargs:
    """Options with every state that a dtype can hold."""
    return low_precision(name, STATEFUL[name]) if dtype.itemsize == 2 else STATEFUL[name]


def build(name: str, params: Any, options: Kwargs, mode: str = "default") -> Optimizer:
    """The AGC class of a torch.optim name."""
    optimizer: Optimizer = OPTIMIZERS[name](params, **options, **MODES[mode])
    return optimizer
