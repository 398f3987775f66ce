"""The Triton path's tables on the device, and what is compared with them before every step.

A stale address corrupts memory: the addresses of parameters, gradients and states are read again
at every step. What merely changed is copied to the tables in one go; what no longer fits (strides,
alignment, other tensors) makes `FusedStep.refresh` return False, and the caller plans anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agc_triton.kernels import abi
from agc_triton.rule import KernelRule, number
from agc_triton.snapshot import Layouts
from agc_triton.triton_path.buckets import TensorUnits, plan_buckets
from agc_triton.triton_path.gradients import Gradients
from agc_triton.units import UnitLayout, memory_order, unit_layout
from agc_triton.validation import check_options

# What 128-bit accesses need of every address.
ALIGNMENT = 16

# A change of one of these asks for another plan, not for another value in the tables.
STRUCTURAL = ("unit_dim", "foreach", "fused", "differentiable", "capturable")

# Captures that a plan has pinned memory for: none can be had while a graph is captured.
CAPTURES = 16

CLIP_ONLY = KernelRule("clip", lambda group: 0, lambda group: (), lambda group: ())


class Member(NamedTuple):
    """One parameter of a plan, its states in the rule's order, and the index of its group."""

    param: Tensor
    states: tuple[Tensor, ...]
    group: int


class Tables:
    """Addresses and group values: one host array, one device tensor, one copy when they differ.

    Addresses are those of parameters, gradients, step counts and states, a row per role.
    """

    def __init__(self, roles: int, tensors: int, groups: int, device: torch.device) -> None:
        self.roles, self.device = roles, device
        self._sizes = roles, tensors, groups
        addresses = roles * tensors
        values = addresses + groups * (abi.FIXED_VALUES + abi.RULE_VALUES)
        size = values + groups * abi.RULE_VALUES
        self._host = np.zeros(size, np.int64)
        self.host_addresses = self._host[:addresses].reshape(roles, -1)
        self.host_values = self._host[addresses:values].view(np.float64).reshape(groups, -1)
        self.host_pointers = self._host[values:].reshape(groups, -1)
        self._on_device = torch.empty(size, dtype=torch.int64, device=self.device)
        self.addresses = self._on_device[:addresses]
        self.values = self._on_device[addresses:values].view(torch.float64)
        self.pointers = self._on_device[values:]
        # Memory for captured graphs to copy from, which twins share.
        self._for_captures: list[Tensor] = []

    def twin(self) -> Tables:
        """Tables with the same contents, which have not been uploaded."""
        twin = Tables(*self._sizes, self.device)
        twin._host[:] = self._host
        twin._for_captures = self._for_captures
        return twin

    def _staging(self, rows: int) -> Tensor:
        # torch's pool hands a pinned block out again only when the copies from it have finished.
        pinned = self.device.type == "cuda"
        size = rows, len(self._host)
        return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)

    def set_group(self, index: int, values: list[float], pointers: list[int]) -> bool:
        """Write a group's row; whether that has changed anything."""
        rows = (self.host_values[index], values), (self.host_pointers[index], pointers)
        changed = any(row[: len(new)].tolist() != new for row, new in rows)
        for row, new in rows:
            row[: len(new)] = new
        return changed

    def upload(self, capturing: bool) -> None:
        """Copy the host's values to the device without waiting for it.

        Raises:
            RuntimeError: more captures than there is memory for.
        """
        if capturing:
            if not self._for_captures:
                raise RuntimeError(
                    f"no more than {CAPTURES} steps can be captured in CUDA graphs without a step"
                    " in between that is not captured; make one"
                )
            # Replays copy from it again.
            staging = self._replayed = self._for_captures.pop()
        else:
            self._for_captures = self._for_captures or list(self._staging(CAPTURES))
            staging = self._staging(1)[0]
        staging.numpy()[:] = self._host
        self._on_device.copy_(staging, non_blocking=True)


class FusedStep:
    """The plan for parameters of one device, dtype and set of flags.

    It keeps no parameter, gradient or state alive; `refresh` and `run` are told what they are.

    Args:
        rule: the update rule.
        members: parameters: dense, not empty, of one device and dtype.
        groups: the options of all groups.
        counts: fp32 step counts on the device, one element per member; they are kept alive.
        launcher: `agc_triton.triton_path.launches.StepLauncher`.
        captured: where everything goes that the replays of a captured graph read.
    """

    def __init__(
        self,
        rule: KernelRule,
        members: Sequence[Member],
        groups: Sequence[Mapping[str, Any]],
        counts: Sequence[Tensor],
        launcher: Callable[..., Any],
        captured: list[Any],
    ) -> None:
        params = [member.param for member in members]
        self.rule, self.device, self._counts = rule, params[0].device, counts
        self.flags = rule.flags(groups[members[0].group])
        real = params[0].dtype.to_real()
        self._captured, self._frozen = captured, False
        n_states = len(members[0].states)
        self._grads = Gradients(params)
        states = [[m.states[s] for m in members] for s in range(n_states)]
        # In the order of `refresh`: the state that counts, where there is one, then the rule's.
        kept = [*params, *(counts if rule.counts else ()), *chain.from_iterable(states)]
        self._layouts = Layouts(kept)
        self._addresses = list(map(Tensor.data_ptr, kept))
        addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in (params, *states)]
        grads = [0 if p.grad is None else p.grad.data_ptr() for p in params]
        table = np.array([grads, *addresses], np.int64)
        self._aligned = np.all(table % ALIGNMENT == 0, axis=0)
        units = [
            TensorUnits(kernel_layout(m.param, groups[m.group]["unit_dim"]), aligned, m.group)
            for m, aligned in zip(members, self._aligned.tolist(), strict=True)
        ]
        self.plan = plan_buckets(units, real.itemsize, n_states)
        self.tables = Tables(abi.FIRST_STATE + n_states, len(params), len(groups), self.device)
        with_addresses = (abi.PARAM, *range(abi.FIRST_STATE, self.tables.roles))
        for role, of_role in zip(with_addresses, addresses, strict=True):
            self.tables.host_addresses[role] = of_role
        self.tables.host_addresses[abi.STEP] = list(map(Tensor.data_ptr, counts))
        self.launcher = launcher(self.plan, self.tables, rule.name, self.flags, real)
        self._grad_addresses: list[int] = []
        self._groups: dict[int, dict[str, Any]] = {m.group: {} for m in members}
        self._tensors = dict.fromkeys(self._groups, False)
        # Hyperparameters on other devices than this one, by group and position.
        self._brought: dict[tuple[int, int], Tensor] = {}
        self._structure = {g: _structure(groups[g]) for g in self._groups}
        self._changed = True

    def refresh(
        self,
        params: list[Tensor],
        states: Sequence[list[Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> bool:
        """Compare everything with the tables; False if this plan does not fit any more.

        ``states`` are by role, step counts first where the optimizer's state holds them.
        """
        if self._frozen:
            self._thaw()
        held = [*params, *chain.from_iterable(states)]
        if not self._layouts.fit(held):
            return False
        if list(map(Tensor.data_ptr, held)) != self._addresses:
            return False
        if not self._refresh_grads(params):
            return False
        return all(self._refresh_group(index, groups[index]) for index in self._groups)

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        """Upload what has changed and launch."""
        if capturing:
            self._captured.append((self.launcher, self._counts, dict(self._brought)))
            self._frozen = True
        if self._changed:
            self.tables.upload(capturing)
            self._changed = False
        self.launcher.fire(grad_scale, found_inf, capturing)
        if self.rule is CLIP_ONLY:
            self._grads.write_back()
        self._grads.drop_copies()

    def _thaw(self) -> None:
        """Leave the tables to the graph that captured them, and go on with others."""
        self.tables = self.tables.twin()
        self.launcher = self.launcher.twin(self.tables)
        self._frozen, self._changed = False, True

    def _refresh_grads(self, params: list[Tensor]) -> bool:
        addresses = self._grads.read(params)
        if addresses is None:
            return False
        if addresses == self._grad_addresses:
            return True
        table = np.array(addresses, np.int64)
        if (table[self._aligned] % ALIGNMENT).any():
            return False
        self.tables.host_addresses[abi.GRAD] = table
        self._grad_addresses = addresses
        self._changed = True
        return True

    def _refresh_group(self, index: int, group: Mapping[str, Any]) -> bool:
        # Lists may be changed in place.
        options = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in group.items()
            if key != "params"
        }
        before = self._groups[index]
        # What a tensor holds, and where, may have changed.
        if not self._tensors[index] and (_identical(options, before) or _same(options, before)):
            return True
        if _structure(group) != self._structure[index] or self.rule.flags(group) != self.flags:
            return False
        check_options(group, f" in parameter group {index}")
        sign = -1.0 if group.get("maximize") else 1.0
        values = [group["clipping"] or math.inf, group["agc_eps"], sign]
        pointers = []
        hyper = self.rule.hyper(group)
        for k, value in enumerate(hyper):
            pointer = self._pointer(value, group, index, k) if isinstance(value, Tensor) else 0
            pointers.append(pointer)
            values.append(0.5 if pointer else number(value))
        self._changed |= self.tables.set_group(index, values, pointers)
        self._groups[index] = options
        self._tensors[index] = any(isinstance(value, Tensor) for value in hyper)
        return True

    def _pointer(self, value: Tensor, group: Mapping[str, Any], index: int, k: int) -> int:
        """Where the kernels read the k-th hyperparameter, or 0 if its value goes in the tables."""
        if not (value.is_cuda or (group.get("capturable") and value.device == self.device)):
            return 0
        if value.device != self.device:
            if (index, k) not in self._brought:
                self._brought[index, k] = torch.empty_like(value, device=self.device)
            brought = self._brought[index, k]
            value = brought.copy_(value, non_blocking=True)
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
    return options.keys() == before.keys() and all(
        _same_value(value, before[key]) for key, value in options.items()
    )


def _same_value(value: Any, before: Any) -> bool:
    if isinstance(value, tuple):
        return type(before) is tuple and all(map(_same_value, value, before))
    if isinstance(value, Tensor) or isinstance(before, Tensor):
        return value is before
    return bool(value == before)
