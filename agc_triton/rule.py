"""What an optimizer hands to a backend: lists of tensors, its update rule, its AGC settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.sharded import Kind, is_sharded, kind_of, locals_of


class TensorLists(NamedTuple):
    """What one call of a torch.optim functional updates, one entry per parameter.

    ``states`` holds one list per state role in the order of torch's functional; the list of a role
    that is switched off is empty, and so is ``steps`` for an optimizer that counts none.
    ``scalars`` are what it moves on beside its steps, one element each, as NAdam's mu_product.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: tuple[list[Tensor], ...]
    steps: list[Tensor]
    scalars: tuple[list[Tensor], ...] = ()

    def select(self, indices: list[int]) -> TensorLists:
        """The entries at these indices."""
        states, scalars = (
            tuple(pick(indices, role) for role in roles) for roles in (self.states, self.scalars)
        )
        params, grads, steps = (pick(indices, t) for t in (self.params, self.grads, self.steps))
        return TensorLists(params, grads, states, steps, scalars)

    def local(self) -> TensorLists:
        """The same of what lies on this rank."""
        params, grads, *states = map(locals_of, (self.params, self.grads, *self.states))
        return self._replace(params=params, grads=grads, states=tuple(states))


def pick(indices: list[int], tensors: list[Tensor]) -> list[Tensor]:
    """The tensors at ascending indices, if there are any."""
    if len(indices) == len(tensors):  # mostly, and once per tensor and step is much
        return tensors
    return [tensors[i] for i in indices] if tensors else []


class KernelRule(NamedTuple):
    """How a group's options become a kernel rule's arguments.

    ``name`` is the rule in kernels/rules.py, or ``module:name`` one of another module, which is
    imported where something takes the Triton path. ``flags(group)`` are its compile-time options,
    ``states(group)`` the keys of a parameter's state tensors, and ``hyper(group)`` the rule's raw
    values: numbers or one-element tensors. ``prepared`` is how many numbers ``NAME_prepare`` gives.
    ``scalars`` are the keys of fp32 state tensors of one element that it counts on, "step" first,
    and ``own_scalars`` how many more of them it needs that torch keeps none of: 0 before a
    parameter's first step, and 1 where its states are there already. ``writes_grad`` where the
    result is the gradient's, not the parameter's.
    """

    name: str
    flags: Callable[[Mapping[str, Any]], int]
    states: Callable[[Mapping[str, Any]], tuple[str, ...]]
    hyper: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    prepared: int
    scalars: tuple[str, ...] = ()
    own_scalars: int = 0
    writes_grad: bool = False

    @property
    def n_scalars(self) -> int:
        """All scalars of a parameter."""
        return len(self.scalars) + self.own_scalars


Update = Callable[[TensorLists], None]

# What an optimizer updates in one step of a group, each with the group's options.
Batches = list[tuple[TensorLists, Mapping[str, Any]]]


class Rule(NamedTuple):
    """One torch.optim update rule.

    ``update(lists, group, **scaler)`` is torch's functional form: it heeds the group's foreach and
    fused, and ``scaler`` (grad_scale, found_inf) where torch takes it, and counts every tensor of
    ``lists.steps`` up by one. ``fused(group, dtype)`` gives torch's fused kernel for CPU tensors of
    one dtype, whose steps have been counted already, or None where it does not do what ``update``
    does. ``kernel`` is the same rule for the Triton path. ``roles`` are the keys of all states that
    ``update`` may take, in its order; ``sparse`` says that it takes sparse gradients too, and
    ``foreach`` that torch's foreach implementation is the faster of the two without a fused kernel.
    """

    update: Callable[..., None]
    fused: Callable[[Mapping[str, Any], torch.dtype], Update | None]
    kernel: KernelRule
    roles: tuple[str, ...] = ()
    sparse: bool = False
    foreach: bool = False

    def lists(
        self,
        params: list[Tensor],
        state: Mapping[Tensor, Mapping[str, Any]],
        group: Mapping[str, Any],
    ) -> TensorLists:
        """What updates these parameters, all of which have a gradient and their states."""
        entries, there = [state[p] for p in params], self.kernel.states(group)
        grads: list[Any] = [p.grad for p in params]
        states = tuple(
            [entry[key] for entry in entries] if key in there else [] for key in self.roles
        )
        steps, *scalars = [[entry[key] for entry in entries] for key in self.kernel.scalars] or [[]]
        return TensorLists(params, grads, states, steps, tuple(scalars))


class Work(NamedTuple):
    """What one step is made on: an optimizer's groups and state, and how they are updated.

    ``collect(group)`` creates states and gives what has a gradient; ``name`` is the class's, for
    messages; with ``tracking`` some steps keep the ratios of all units.
    """

    name: str
    rule: Rule
    groups: Sequence[dict[str, Any]]
    state: MutableMapping[Tensor, dict[str, Any]]
    collect: Callable[[dict[str, Any]], Batches]
    backend: str
    nonfinite: str
    tracking: bool = False

    @property
    def own(self) -> dict[str, str]:
        """The options of the whole optimizer."""
        return {"backend": self.backend, "nonfinite": self.nonfinite}

    def needs_units(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's units are clipped, or skipped where they are not finite."""
        return bool(group["clipping"]) or self.nonfinite == "skip_unit"

    def sums_units(self, group: Mapping[str, Any]) -> bool:
        """Whether norms of a group's units are wanted over ranks, be it to record them only."""
        return self.needs_units(group) or self.tracking

    def kind_of(self, param: Tensor, group: Mapping[str, Any]) -> Kind:
        """How a parameter of a group is stepped on this rank.

        Autograd sees DTensors, not what lies here, and what needs no units has none to split.
        """
        if not is_sharded(param):
            return Kind.WHOLE
        if group.get("differentiable"):
            return Kind.OTHER
        kind = kind_of(param, group["unit_dim"])
        return kind if self.sums_units(group) or kind is Kind.OTHER else Kind.WHOLE


def number(value: Any) -> float:
    """A hyperparameter, which may be a tensor of one element, for functions that take numbers.

    Raises:
        TypeError, ValueError, RuntimeError: it is not a number.
    """
    if type(value) is float:  # mostly
        return value
    return float(value.item() if isinstance(value, Tensor) else value)
