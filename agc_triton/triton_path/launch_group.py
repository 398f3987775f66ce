"""What is launched together: parameters of one device, dtypes and set of flags, and their tables.

A stale address corrupts memory. Where parameters, scalars and states lie, and how, is compared
before every step (`agc_triton.snapshot`); gradients and options are read again here, and what has
changed is copied to the device in one go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agc_triton.exchange import Place
from agc_triton.kernels import abi
from agc_triton.norms import Clip
from agc_triton.rule import KernelRule, number
from agc_triton.sharded import is_sharded, layout_here, locals_of
from agc_triton.snapshot import bug
from agc_triton.triton_path.buckets import TensorUnits, plan_buckets
from agc_triton.triton_path.compiling import Kernel
from agc_triton.triton_path.gradients import Gradients, grad_dtype
from agc_triton.triton_path.launches import PlacedRecords, StepLauncher
from agc_triton.triton_path.tables import Tables
from agc_triton.units import UnitDim, UnitLayout
from agc_triton.validation import check_options

# A change of one of these asks for another plan, not for another value in the tables.
STRUCTURAL = ("unit_dim", "foreach", "fused", "differentiable", "capturable")

# Bytes of a parameter that are read in one access where all roles are aligned for it.
ACCESS = 16


class Member(NamedTuple):
    """One parameter of a plan, or the DTensor whose local tensor is one; states are local.

    ``layout`` is that of its real elements, ``group`` its group's index; scalars and states are in
    the rule's order. ``place`` is where its units are added up, if ranks share them.
    """

    param: Tensor
    layout: UnitLayout
    group: int
    scalars: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    place: Place | None


class GroupOptions:
    """The options of a group when its row in the tables was written."""

    def __init__(self, rule: KernelRule, group: Mapping[str, Any]) -> None:
        self._rule = rule
        self._structure = self._of(group)
        self._keys: list[str] = []
        self._values: list[Any] = []

    def same(self, group: Mapping[str, Any]) -> bool:
        """Whether they are the very objects they were, and none that may change in place."""
        return list(group) == self._keys and all(map(is_, group.values(), self._values))

    def fit(self, group: Mapping[str, Any]) -> bool:
        """Whether a change asks for other values in the tables alone, not for another plan."""
        return self._of(group) == self._structure

    def remember(self, group: Mapping[str, Any]) -> None:
        """The row holds these now."""
        volatile = [value for key, value in group.items() if key not in ("params", "param_names")]
        volatile += self._rule.hyper(group)
        if any(isinstance(value, (Tensor, list)) for value in volatile):
            self._keys, self._values = [], []
        else:
            self._keys, self._values = list(group), list(group.values())

    def _of(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return self._rule.flags(group), *map(group.get, STRUCTURAL)


class LaunchGroup:
    """Launches and their tables; keeps no parameter, gradient or state alive.

    Args:
        rule: the update rule.
        members: parameters: dense, not empty, of one device and dtype, their gradients of one too.
        groups: the options of all groups.
        records: where something is kept of their units; None if nothing is.
        captured: where everything goes that the replays of a captured graph read.
    """

    def __init__(
        self,
        rule: KernelRule,
        members: Sequence[Member],
        groups: Sequence[Mapping[str, Any]],
        records: PlacedRecords | None,
        captured: list[Any],
    ) -> None:
        owners, options = [m.param for m in members], groups[members[0].group]
        params = locals_of(owners)
        n_states, dtype = len(members[0].states), params[0].dtype.to_real()
        self.rule, self.device = rule, params[0].device
        # A captured graph goes on to count where they lie.
        self._scalars = [m.scalars for m in members]
        self._captured, self._frozen = captured, False
        of_grads = grad_dtype(owners[0])
        self._grads = Gradients(params, of_grads, sharded=any(map(is_sharded, owners)))
        tensors = [params, *zip(*(m.scalars + m.states for m in members), strict=True)]
        addresses = [list(map(Tensor.data_ptr, role)) for role in tensors]
        grads = self._grads.read(owners)
        if grads is None:
            raise bug("gradients that were checked do not fit")
        first_state = abi.SCALARS + rule.n_scalars
        self.tables = Tables(first_state + n_states, len(params), len(groups), self.device)
        host = self.tables.host_addresses
        for row, of_role in zip(host, [addresses[0], grads, *addresses[1:]], strict=True):
            row[:] = of_role
        kernel = Kernel(rule, rule.flags(options), n_states, dtype, of_grads.to_real(), dtype)
        param, self._grad_access, state = kernel.access(ACCESS)
        read = [abi.PARAM, abi.GRAD, *range(first_state, self.tables.roles)]
        access = np.array([param, self._grad_access, *[state] * n_states])
        self._aligned = np.all(host[read] % access[:, None] == 0, axis=0)
        units = [
            TensorUnits(m.layout, aligned, m.group, m.place and m.place.first)
            for m, aligned in zip(members, self._aligned.tolist(), strict=True)
        ]
        self.plan = plan_buckets(units, dtype.itemsize, n_states)
        # A pair of partial sums, of squares of p and g, for each part of a split unit.
        self._sums = torch.empty(
            2 * max(self.plan.sums, 1), dtype=kernel.compute, device=self.device
        )
        pool = next((m.place.pool for m in members if m.place), None)
        self._exchanged = pool or ()
        self._page, self._tracked = records and records.page, False
        self.launcher = StepLauncher(self.plan, kernel, self.device, self._sums, records, pool)
        self._grad_addresses = grads
        self._options = {m.group: GroupOptions(rule, groups[m.group]) for m in members}
        self._rows: dict[int, tuple[list[float], list[int]] | None] = {}
        # Hyperparameters on other devices than this one, by group and position.
        self._brought: dict[tuple[int, int], Tensor] = {}
        self._changed, self._streams = True, set[torch.cuda.Stream]()
        self._write_groups(groups, self._options)
        self.launcher.load(self.tables)

    def write_tables(self, params: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> bool:
        """Read gradients and options again; False if they need another plan.

        ``params`` are the members', ``groups`` the options of all groups.
        """
        if self._frozen:
            self._thaw()
        changed = [i for i, options in self._options.items() if not options.same(groups[i])]
        for index in changed:
            if not self._options[index].fit(groups[index]):
                return False
            check_options(groups[index], index)
        if not self._write_grads(params):
            return False
        self._write_groups(groups, changed)
        return True

    def begin(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        number: int | None,
        capturing: bool,
    ) -> None:
        """Upload what has changed, count steps, prepare and sum; a tracked step has a number."""
        self._tracked = number is not None
        if capturing:
            kept = self.launcher, self.tables, self._scalars, dict(self._brought), self._exchanged
            self._captured.append(kept)
            self._frozen = True
            if self._page is not None:
                self._page.captured = True
        elif self.device.type == "cuda":
            self._record_stream(torch.cuda.current_stream(self.device))
        if self._changed:
            self.tables.upload(capturing)
            self._changed = False
        self.launcher.begin(self.tables, grad_scale, found_inf, number)

    def update(self) -> None:
        """Clip and update the units that are whole here."""
        self.launcher.update(self.tables, self._tracked)

    def finish(self) -> None:
        """The same for those that are split between ranks, whose totals are there."""
        self.launcher.update_across(self.tables, self._tracked)
        if self.rule.writes_grad:
            self._grads.write_back()
        self._grads.drop_copies()

    @property
    def has_grad(self) -> list[int]:
        """Which members have a gradient: those with 0 have none."""
        return self._grad_addresses

    def _record_stream(self, stream: torch.cuda.Stream) -> None:
        """Once this plan is dropped its memory is not used again before the stream has read it."""
        if stream not in self._streams:
            kept = [*self.launcher.tensors, self._sums, self.tables.on_device, *self._exchanged]
            kept += self._page.tensors if self._page is not None else ()
            for tensor in kept:
                tensor.record_stream(stream)
            self._streams.add(stream)

    def _thaw(self) -> None:
        """Leave the tables to the graph that captured them, and go on with others."""
        self.tables, self._streams = self.tables.twin(), set()
        self._frozen, self._changed = False, True

    def _write_grads(self, params: Sequence[Tensor]) -> bool:
        addresses = self._grads.read(params)
        if addresses is None:
            return False
        if addresses == self._grad_addresses:
            return True
        table = np.array(addresses, np.int64)
        if (table[self._aligned] % self._grad_access).any():
            return False
        self.tables.host_addresses[abi.GRAD] = table
        self._grad_addresses = addresses
        self._changed = True
        return True

    def _write_groups(self, groups: Sequence[Mapping[str, Any]], changed: Iterable[int]) -> None:
        for index in changed:
            row = self._row(index, groups[index])
            if row != self._rows.get(index):
                self.tables.set_group(index, *row)
                self._rows[index] = row
                self._changed = True
            self._options[index].remember(groups[index])

    def _row(self, index: int, group: Mapping[str, Any]) -> tuple[list[float], list[int]]:
        """A group's values, and where the kernels read those of its hyperparameters instead."""
        clip = Clip.of(group)
        values = [clip.clipping, clip.agc_eps, -1.0 if group.get("maximize") else 1.0]
        pointers = []
        for k, value in enumerate(self.rule.hyper(group)):
            pointer = self._pointer(value, group, index, k) if isinstance(value, Tensor) else 0
            pointers.append(pointer)
            values.append(0.5 if pointer else number(value))
        return values, pointers

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


def kernel_layout(param: Tensor, unit_dim: UnitDim) -> UnitLayout:
    """The layout of a dense parameter, or of what of it lies here, in real elements.

    A complex one is two.
    """
    layout = layout_here(param, unit_dim)
    assert layout is not None
    return layout._replace(inner=2 * layout.inner) if param.is_complex() else layout
