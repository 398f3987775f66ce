"""Rules made of torch.optim's functionals: which of a group's options they take, and as what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from agc_triton.rule import KernelRule, Rule, TensorLists

# Options that hold several of a functional's arguments.
_PARTS = {
    "betas": ("beta1", "beta2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}
# What chooses an implementation, where a functional has it.
_MODES = ("foreach", "fused", "maximize", "differentiable", "capturable")


def arguments(group: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A functional's arguments from these options of a group, in their order."""
    found: dict[str, Any] = {}
    for key in keys:
        found |= zip(_PARTS[key], group[key], strict=True) if key in _PARTS else {key: group[key]}
    return found


def updating(functional: Callable[..., None], keys: tuple[str, ...]) -> Callable[..., None]:
    """The ``update`` of a `Rule` that calls a functional of torch.optim with these options."""
    taken = inspect.signature(functional).parameters
    modes = tuple(mode for mode in _MODES if mode in taken)

    def update(lists: TensorLists, group: Mapping[str, Any], **scaler: Tensor | None) -> None:
        given = arguments(group, keys + modes)
        if "has_complex" in taken:
            given["has_complex"] = any(p.is_complex() for p in lists.params)
        if "has_sparse_grad" in taken:
            given["has_sparse_grad"] = any(g.is_sparse for g in lists.grads)
        if "grad_scale" in taken:
            given |= scaler
        steps = [lists.steps] if "state_steps" in taken else []
        functional(lists.params, lists.grads, *lists.states, *lists.scalars, *steps, **given)

    return update


def rule_of(
    functional: Callable[..., None],
    keys: tuple[str, ...],
    roles: tuple[str, ...],
    prepared: int,
    scalars: tuple[str, ...] = ("step",),
    **more: Any,
) -> Rule:
    """The rule of a functional whose states are always the same.

    Its kernel rule has the functional's name, and takes the arguments that ``keys`` are as they
    come. ``more`` is that of `Rule`; torch has no fused kernel unless it says so.
    """
    kernel = KernelRule(
        functional.__name__,
        flags=lambda group: 0,
        states=lambda group: roles,
        hyper=lambda group: tuple(arguments(group, keys).values()),
        prepared=prepared,
        scalars=scalars,
    )
    rule = Rule(updating(functional, keys), no_fused, kernel, roles)
    return rule._replace(**more)


def no_fused(_group: Mapping[str, Any], _dtype: Any) -> None:
    """For what torch has no fused kernel for on a CPU."""
