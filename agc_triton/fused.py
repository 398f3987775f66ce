"""The Triton path's tables on the device, and what is compared with them before every step.

A stale address corrupts memory: the addresses of parameters, gradients and states are read again
at every step. What merely changed is copied to the tables in one go; what no longer fits (strides,
alignment, other tensors) makes `FusedStep.refresh` return False, and the caller plans anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agc_triton.buckets import TensorUnits, plan_buckets
from agc_triton.gradients import Gradients
from agc_triton.layouts import Layouts
from agc_triton.rule import KernelRule
from agc_triton.units import UnitLayout, memory_order, unit_layout
from agc_triton.validation import check_options

# What 128-bit accesses need of every address.
ALIGNMENT = 16

# Values per group in the tables: clipping, agc_eps, sign and a rule's own (kernels/rules.py).
FIXED_VALUES = 3
RULE_VALUES = 8

# A change of one of these asks for another plan, not for another value in the tables.
STRUCTURAL = ("unit_dim", "foreach", "fused", "differentiable", "capturable")

CLIP_ONLY = KernelRule("clip", lambda group: 0, lambda group: 0, lambda group: ())


class Member(NamedTuple):
    """One parameter of a plan, its states in the rule's order, and the index of its group."""

    param: Tensor
    states: tuple[Tensor, ...]
    group: int


class Tables:
    """Addresses and group values: one host array, one device tensor, one copy when they differ.

    ``counts`` holds the step count of each tensor, fp32 on the device as torch's fused=True has it.
    """

    def __init__(self, roles: int, groups: int, counts: Tensor) -> None:
        self.roles, self.counts, self.device = roles, counts, counts.device
        addresses = roles * len(counts)
        values = addresses + groups * (FIXED_VALUES + RULE_VALUES)
        size = values + groups * RULE_VALUES
        self._host = np.zeros(size, np.int64)
        self.host_addresses = self._host[:addresses].reshape(roles, -1)
        self.host_values = self._host[addresses:values].view(np.float64).reshape(groups, -1)
        self.host_pointers = self._host[values:].reshape(groups, -1)
        self._on_device = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.addresses = self._on_device[:addresses]
        self.values = self._on_device[addresses:values].view(torch.float64)
        self.pointers = self._on_device[values:]
        # Whether any hyperparameter is read from a tensor on the device.
        self.has_pointers = False
        # Replays of a captured graph copy from it again: kept, and written in capture only.
        self._captured = self._staging()

    def _staging(self) -> Tensor:
        # torch's pool hands a pinned block out again only when the copies from it have finished.
        pinned = self.device.type == "cuda"
        return torch.empty(len(self._host), dtype=torch.int64, device="cpu", pin_memory=pinned)

    def upload(self, capturing: bool) -> None:
        """Copy the host's values to the device without waiting for it."""
        staging = self._captured if capturing else self._staging()
        staging.numpy()[:] = self._host
        self.has_pointers = bool(self.host_pointers.any())
        self._on_device.copy_(staging, non_blocking=True)


class FusedStep:
    """The plan for parameters of one device, dtype and set of flags.

    It keeps no parameter, gradient or state alive; `refresh` and `run` are told what they are.

    Args:
        rule: the update rule.
        members: parameters: dense, not empty, of one device and dtype.
        groups: the options of all groups.
        counts: fp32 step counts on the device, one per member.
        launcher: `agc_triton.kernels.launch.StepLauncher`.
    """

    def __init__(
        self,
        rule: KernelRule,
        members: Sequence[Member],
        groups: Sequence[Mapping[str, Any]],
        counts: Tensor,
        launcher: Callable[..., Any],
    ) -> None:
        params = [member.param for member in members]
        self.rule = rule
        self.flags = rule.flags(groups[members[0].group])
        real = params[0].dtype.to_real()
        self.frozen = False
        # Addresses of step counts that are kept in optimizer.state.
        n_states = len(members[0].states)
        self._params, self._grads = Layouts(params), Gradients(params)
        roles = [params, *([m.states[s] for m in members] for s in range(n_states))]
        addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in roles]
        self._addresses = addresses
        grads = [0 if p.grad is None else p.grad.data_ptr() for p in params]
        table = np.array([grads, *addresses], np.int64)
        self._aligned = np.all(table % ALIGNMENT == 0, axis=0)
        units = [
            TensorUnits(kernel_layout(m.param, groups[m.group]["unit_dim"]), aligned, m.group)
            for m, aligned in zip(members, self._aligned.tolist(), strict=True)
        ]
        self.plan = plan_buckets(units, real.itemsize, n_states)
        self.tables = Tables(2 + n_states, len(groups), counts)
        for role, of_role in zip((0, *range(2, 2 + n_states)), addresses, strict=True):
            self.tables.host_addresses[role] = of_role
        self.launcher = launcher(self.plan, self.tables, rule.name, self.flags, real)
        self._grad_addresses: list[int] = []
        self._groups: dict[int, dict[str, Any]] = {m.group: {} for m in members}
        self._tensors = dict.fromkeys(self._groups, False)
        self._structure = {g: _structure(groups[g]) for g in self._groups}
        self._changed = True

    def refresh(
        self,
        params: list[Tensor],
        states: Sequence[list[Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> bool:
        """Compare everything with the tables; False if this plan does not fit any more."""
        if not self._params.fit(params):
            return False
        for tensors, addresses in zip((params, *states), self._addresses, strict=True):
            if list(map(Tensor.data_ptr, tensors)) != addresses:
                return False
        if not self._refresh_grads(params):
            return False
        return all(self._refresh_group(index, groups[index]) for index in self._groups)

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        """Upload what has changed and launch."""
        self.frozen |= capturing
        if self._changed:
            self.tables.upload(capturing)
            self._changed = False
        self.launcher.fire(grad_scale, found_inf)
        if self.rule is CLIP_ONLY:
            self._grads.write_back()
        self._grads.drop_copies()

    def _refresh_grads(self, params: list[Tensor]) -> bool:
        addresses = self._grads.read(params)
        if addresses is None:
            return False
        if addresses == self._grad_addresses:
            return True
        table = np.array(addresses, np.int64)
        if (table[self._aligned] % ALIGNMENT).any():
            return False
        self.tables.host_addresses[1] = table
        self._grad_addresses = addresses
        self._changed = True
        return True

    def _refresh_group(self, index: int, group: Mapping[str, Any]) -> bool:
        options = {key: value for key, value in group.items() if key != "params"}
        before = self._groups[index]
        if not self._tensors[index] and _identical(options, before):
            return True
        if _same(options, before):
            return True
        if _structure(group) != self._structure[index] or self.rule.flags(group) != self.flags:
            return False
        check_options(group, f" in parameter group {index}")
        sign = -1.0 if group.get("maximize") else 1.0
        values = [group["clipping"] or math.inf, group["agc_eps"], sign]
        pointers = []
        hyper = self.rule.hyper(group)
        for value in hyper:
            pointer = self._pointer(value, group, index) if isinstance(value, Tensor) else 0
            pointers.append(pointer)
            values.append(0.5 if pointer else float(value))
        self.tables.host_values[index, : len(values)] = values
        self.tables.host_pointers[index, : len(pointers)] = pointers
        self._groups[index] = options
        self._tensors[index] = any(isinstance(value, Tensor) for value in hyper)
        self._changed = True
        return True

    def _pointer(self, value: Tensor, group: Mapping[str, Any], index: int) -> int:
        """Where the kernels read a hyperparameter, or 0 if its value goes in the tables."""
        if value.device != self.tables.device or not (value.is_cuda or group.get("capturable")):
            return 0
        if value.dtype != torch.float32:
            raise RuntimeError(
                f"a hyperparameter tensor on {value.device} must be float32, not"
                f" {value.dtype}, in parameter group {index}; convert it, or use a float"
            )
        return value.data_ptr()


def kernel_layout(param: Tensor, unit_dim: int | None) -> UnitLayout:
    """A dense parameter's layout in real elements: a complex one is two."""
    order = memory_order(param)
    assert order is not None
    layout = unit_layout(param.shape, order, unit_dim)
    return layout._replace(inner=2 * layout.inner) if param.is_complex() else layout


def _structure(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in STRUCTURAL)


def _identical(options: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether they hold the same objects in the same order, which costs least to find out."""
    return list(options) == list(before) and all(map(is_, options.values(), before.values()))


def _same(options: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether no option can have changed, some being tensors: host tensors always can have."""
    return options.keys() == before.keys() and all(
        _same_value(value, before[key]) for key, value in options.items()
    )


def _same_value(value: Any, before: Any) -> bool:
    if isinstance(value, tuple):
        return type(before) is tuple and all(map(_same_value, value, before))
    if isinstance(value, Tensor):
        return value is before and value.is_cuda
    return not isinstance(before, Tensor) and bool(value == before)
