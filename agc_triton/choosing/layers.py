"""A model's parameters with their options of AGC, and the ratios of their units."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from agc_triton.model.entries import entries_of
from agc_triton.norms import unit_norms
from agc_triton.optim.optimizer import AGC_EPS, CLIPPING
from agc_triton.units import UnitDim, count_units
from agc_triton.validation import check_group

DEFAULTS: Mapping[str, Any] = {"clipping": CLIPPING, "agc_eps": AGC_EPS, "unit_dim": None}


@dataclass(frozen=True, eq=False)
class Layer:
    """A parameter with the options of its group; ``ratios`` of its units, (units,) per batch.

    They are float64 and on the CPU.
    """

    name: str
    group: int
    param: Tensor
    clipping: float
    agc_eps: float
    unit_dim: UnitDim
    ratios: list[Tensor] = field(default_factory=list)

    @property
    def units(self) -> int:
        """How many units it has."""
        return count_units(self.param.shape, self.unit_dim)

    @torch.no_grad()
    def look(self, batch: int) -> None:
        """Add ||g|| / max(||w||, agc_eps) of each unit, if there is a gradient.

        Raises:
            RuntimeError: a gradient's norm is not finite.
        """
        grad = self.param.grad
        if grad is None:
            return
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        norms = _on_cpu(unit_norms(grad, self.unit_dim))
        if not norms.isfinite().all():
            raise RuntimeError(
                f"the gradient of {self.name!r} is not finite in batch {batch}, so that its ratio"
                " to the weights says nothing; leave this batch out, or make the loss smaller"
            )
        least = max(self.agc_eps, sys.float_info.min)  # a gradient of 0 has the ratio 0
        self.ratios.append(norms / _on_cpu(unit_norms(self.param, self.unit_dim)).clamp(min=least))


def layers_of(model: nn.Module, optimizer: Optimizer | None) -> list[Layer]:
    """The parameters of an optimizer's groups, or all of the model's with the default options.

    Raises:
        TypeError: a model or an optimizer that is none, or an option of the wrong type.
        ValueError: an option out of range, or one that does not fit a parameter's shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"suggest_clipping takes the model itself, not {type(model).__name__}:"
            " suggest_clipping(model, loss_fn, batches)"
        )
    entries = entries_of(model)
    names = {id(entry.param): entry.names[0] for entry in entries}
    groups: Any = [{"params": [entry.param for entry in entries]}]
    if optimizer is not None:
        groups = getattr(optimizer, "param_groups", None)
        if groups is None:
            raise TypeError(
                "suggest_clipping takes an optimizer with param_groups, not"
                f" {type(optimizer).__name__}"
            )
    layers = []
    for index, given in enumerate(groups):
        group = {**DEFAULTS, **given}
        check_group(group, index, units=True)
        options = group["clipping"] or 0.0, group["agc_eps"], group["unit_dim"]
        # A loss may have parameters of its own, beside the model's.
        others = group.get("param_names") or [
            f"parameter {i} of group {index}" for i in range(len(group["params"]))
        ]
        for param, other in zip(group["params"], others, strict=True):
            layers.append(Layer(names.get(id(param), other), index, param, *options))
    return layers


def check_layers(layers: Sequence[Layer]) -> None:
    """Check that gradients can be taken, and that taking them updates nothing.

    Raises:
        ValueError: a parameter has no shape yet.
        RuntimeError: one has hooks that a backward pass calls when its gradient is there.
    """
    for layer in layers:
        if is_lazy(layer.param):
            raise ValueError(
                f"{layer.name!r} is uninitialized; run the model once before suggest_clipping()"
            )
        if getattr(layer.param, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"{layer.name!r} has hooks that run when its gradient is there and may update it;"
                " call suggest_clipping before they are registered"
            )


def _on_cpu(norms: Tensor) -> Tensor:
    """One after the other in float64; a DTensor's of all ranks."""
    gather = getattr(norms, "full_tensor", None)
    return (norms if gather is None else gather()).detach().cpu().double().flatten()
