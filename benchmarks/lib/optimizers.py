"""The optimizers that are compared, and what they keep and move."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from agc_triton import param_groups
from agc_triton.optim import OPTIMIZERS as REGISTRY


class Optimizer(NamedTuple):
    """A torch.optim class, its AGC class, and the options that both are measured with.

    ``states`` counts the state tensors per parameter. ``modes`` are the arguments that choose
    torch's implementation; ``fastest`` is the mode that short runs keep.
    """

    torch_class: Callable[..., torch.optim.Optimizer]
    agc_class: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    states: int
    modes: dict[str, dict[str, bool]]
    fastest: str

    @property
    def default_lr(self) -> float:
        """That of torch's class."""
        return float(inspect.signature(self.torch_class).parameters["lr"].default)


LR = 1e-9  # so small that weights, and so the share of clipped units, stay what they were
UNFUSED = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}

# What an optimizer is measured with beside the learning rate; SGD is hardly ever used without
# momentum, and Rprop's steps have sizes of their own.
OWN: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
    "Rprop": {"step_sizes": (0.0, LR)},
}


def _measured(name: str, cls: Any) -> Optimizer:
    torch_class, options = cls.torch_class(), {"lr": LR, **OWN.get(name, {})}
    (group,) = cls([torch.zeros(1)], **options).param_groups
    modes, fastest = UNFUSED, "for-loop"
    if "fused" in inspect.signature(torch_class).parameters:
        modes, fastest = {**UNFUSED, "fused": {"fused": True}}, "fused"
    return Optimizer(torch_class, cls, options, len(cls.rule.kernel.states(group)), modes, fastest)


OPTIMIZERS = {name.lower(): _measured(name, cls) for name, cls in REGISTRY.items()}


def backend(optimizer: torch.optim.Optimizer) -> str:
    """What makes an optimizer's steps: triton, torch, or one for some parameters each."""
    explain = getattr(optimizer, "explain", None)
    return " and ".join(filter(None, explain()["backend"].unique())) if explain else "torch"


# What training needs beside the learning rate; SGD is hardly ever used without momentum.
FOR_TRAINING: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9, "nesterov": True}}


def for_training(name: str, model: nn.Module, lr: float, clipping: float) -> torch.optim.Optimizer:
    """An AGC class that leaves the head alone, or torch's class where ``clipping`` is 0."""
    chosen, options = OPTIMIZERS[name], FOR_TRAINING.get(name, {})
    make = chosen.agc_class if clipping else chosen.torch_class
    return make(param_groups(model, clipping=clipping), lr=lr, **options)


def minimal_bytes(optimizer: str, params: Iterable[Tensor]) -> int:
    """Bytes of a step that reads p, g and states once and writes p and states once."""
    size = sum(p.numel() * p.element_size() for p in params)
    return size * (3 + 2 * OPTIMIZERS[optimizer].states)


def state_bytes_of_first_step(optimizer: str, params: Sequence[Tensor]) -> int:
    """Bytes of the state that torch's class makes in its first step; Adagrad's is there before."""
    one: list[Tensor] = [Parameter(torch.zeros(1))]
    one[0].grad = torch.zeros(1)
    torch_class, _, options, states, *_ = OPTIMIZERS[optimizer]
    base = torch_class(one, **options)
    if base.state:
        return 0
    base.step()
    counts = sum(state.nbytes for state in base.state[one[0]].values() if not state.dim())
    return sum(states * p.nbytes + counts for p in params)
