"""The Triton path's plan of a step: which tensors go through the kernels together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, compress
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.exchange import Exchange
from agc_triton.records import Recording, UnitRecords
from agc_triton.rule import KernelRule, Work
from agc_triton.sharded import Kind, any_sharded, local, locals_of
from agc_triton.snapshot import Look
from agc_triton.triton_path.buckets import Bucket, TensorUnits, plan_buckets
from agc_triton.triton_path.gradients import grad_dtype
from agc_triton.triton_path.launch_group import ACCESS, LaunchGroup, kernel_layout
from agc_triton.triton_path.members import (
    Placed,
    check_members,
    create_states,
    has_states,
    members_of,
    place_records,
)
from agc_triton.triton_path.scalars import OwnScalars
from agc_triton.versions import count_writes


class Part(NamedTuple):
    """A launch group and what it is run on.

    ``pick`` finds its parameters among all, ``entries`` are theirs in optimizer.state, and
    ``states`` the keys there of its state tensors.
    """

    launches: LaunchGroup
    pick: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    entries: list[dict[str, Any]]
    states: tuple[str, ...]


class TritonPlan:
    """What a step launches, over the parameters that the kernels take; it keeps none of them.

    Args:
        work: states of parameters with a gradient are created; all groups have been checked.
        taken: per group, the parameters that the kernels can take.
        own: scalars that the states do not hold.
        recording: what is recorded, and where.
        exchange: where units that are split between ranks are added up, if any are.
        captured: as of `LaunchGroup`.

    Raises:
        RuntimeError: a gradient or a state that cannot be walked in step with its parameter.
    """

    def __init__(
        self,
        work: Work,
        taken: Sequence[list[Tensor]],
        own: OwnScalars,
        recording: Recording,
        exchange: Exchange | None,
        captured: list[Any],
    ) -> None:
        self._rule, self._exchange = work.rule.kernel, exchange
        self._records = recording.of_plans
        placed = [(p, index) for index, params in enumerate(taken) for p in params]
        begun = {p for p, index in placed if has_states(work, p, index)}
        for index, params in enumerate(taken):
            create_states(work, index, params)
        found: defaultdict[Any, list[Placed]] = defaultdict(list)
        idle: list[Tensor] = []
        for p, index in placed:
            if p.grad is None and p not in begun:
                idle.append(p)
            else:
                found[launch_key(self._rule, p, work.groups[index])].append((p, index))
        self._rest = _masks(work, taken, exchange, set(idle))
        check_members(work, chain.from_iterable(found.values()))
        self._params = params = _all_params(work)
        self._sharded = any_sharded(params)
        self._pick_idle = _picker(params, idle)
        self._lengths = [len(group["params"]) for group in work.groups]
        self.parts: list[Part] = []
        for members in found.values():
            made = members_of(work, members, own, begun, exchange)
            place = place_records(work, members, recording)
            with _current(members[0][0].device):
                launches = LaunchGroup(self._rule, made, work.groups, place, captured)
            self.parts.append(_part(work, launches, params, members))
        # As long as they are here, no others can be where they were.
        self._entries = list(work.state.values())

    def look(
        self, work: Work, exchange: Exchange | None, records: UnitRecords | None
    ) -> Look | None:
        """What there is now of what the tables hold; for this step its parameters are kept."""
        if exchange is not self._exchange or records is not self._records:
            return None
        entries, groups = work.state.values(), work.groups
        if [len(group["params"]) for group in groups] != self._lengths:
            return None
        if len(entries) != len(self._entries) or not all(map(is_, entries, self._entries)):
            return None
        self._params = params = _all_params(work)
        rest = [
            id(p) for index, mask in self._rest for p in compress(groups[index]["params"], mask)
        ]
        fixed: list[Tensor] = []
        scalars: list[Tensor] = []
        try:
            for part in self.parts:
                fixed += part.pick(params)
                for name in part.states:
                    fixed += map(itemgetter(name), part.entries)
                for name in self._rule.scalars:
                    scalars += map(itemgetter(name), part.entries)
        except KeyError:  # a state is gone
            return None
        if self._sharded:
            fixed = locals_of(fixed)
        return Look((id(work.state), work.nonfinite, work.backend, rest), fixed, [], scalars)

    def write_tables(self, work: Work) -> bool:
        """Read gradients and options again; False if another plan is needed."""
        if any(p.grad is not None for p in self._pick_idle(self._params)):
            return False
        return all(
            part.launches.write_tables(part.pick(self._params), work.groups) for part in self.parts
        )

    def rest(self, groups: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
        """Groups of the parameters that take the torch path, with their index."""
        return [
            (index, {**groups[index], "params": list(compress(groups[index]["params"], mask))})
            for index, mask in self._rest
        ]

    def begin(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        number: int | None,
        capturing: bool,
    ) -> None:
        """Upload tables, count steps, sum the parts of long units.

        ``number`` is that of a step that keeps the ratios of all units.
        """
        for part in self.parts:
            device = part.launches.device
            scaler = _on(grad_scale, device), _on(found_inf, device)
            with _current(device):
                part.launches.begin(*scaler, number, capturing)

    def update(self) -> None:
        """Clip and update what is whole here; autograd is told of all updates."""
        for part in self.parts:
            written: Sequence[Any] = part.pick(self._params)
            if not all(part.launches.has_grad):
                written = list(compress(written, part.launches.has_grad))
            count_writes([p.grad for p in written] if self._rule.writes_grad else written)
            with _current(part.launches.device):
                part.launches.update()
        self._params = []

    def finish(self) -> None:
        """Clip and update what is split between ranks, once these have added up its sums."""
        for part in self.parts:
            with _current(part.launches.device):
                part.launches.finish()


class Preview(NamedTuple):
    """What is launched for parameters of one device and dtype, ``grad`` their gradients'."""

    device: torch.device
    dtype: torch.dtype
    grad: torch.dtype
    states: int
    buckets: tuple[Bucket, ...]
    folds: int


def preview(work: Work, taken: Sequence[list[Tensor]]) -> list[Preview]:
    """What a plan for these parameters of each group would launch; nothing is created."""
    rule = work.rule.kernel
    found: defaultdict[Any, list[TensorUnits]] = defaultdict(list)
    for index, (group, params) in enumerate(zip(work.groups, taken, strict=True)):
        for p in params:
            layout = kernel_layout(p, group["unit_dim"])
            split = work.kind_of(p, group) is Kind.SPLIT
            aligned = local(p).data_ptr() % ACCESS == 0
            units = TensorUnits(layout, aligned, index, 0 if split else None)
            found[launch_key(rule, p, group)].append(units)
    previews = []
    for (device, (dtype, grad), _, states), tensors in found.items():
        planned = plan_buckets(tensors, dtype.to_real().itemsize, states)
        previews.append(Preview(device, dtype, grad, states, planned.buckets, len(planned.folds)))
    return previews


def launch_key(rule: KernelRule, param: Tensor, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the parameters that are launched together have in common."""
    dtypes = param.dtype, grad_dtype(param)
    return param.device, dtypes, rule.flags(group), len(rule.states(group))


def _masks(
    work: Work, taken: Sequence[list[Tensor]], exchange: Exchange | None, idle: set[Tensor]
) -> list[tuple[int, list[bool]]]:
    """The groups with parameters for the torch path, and which these are.

    What has had no gradient yet may have one on another rank, and then is summed there.
    """
    masks = []
    for index, (group, of_group) in enumerate(zip(work.groups, map(set, taken), strict=True)):
        if exchange is not None:
            of_group -= {p for p in of_group & idle if exchange.place(p)}
        masks.append((index, [p not in of_group for p in group["params"]]))
    return [(index, mask) for index, mask in masks if any(mask)]


def _picker(
    params: Sequence[Tensor], some: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """What finds some parameters among all of them later on."""
    position = {id(p): i for i, p in enumerate(params)}
    positions = [position[id(p)] for p in some]
    if positions == list(range(len(params))):
        return lambda params: params
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda params: [params[i] for i in positions]


def _part(
    work: Work, launches: LaunchGroup, params: Sequence[Tensor], members: list[Placed]
) -> Part:
    own, index = [p for p, _ in members], members[0][1]
    entries = [work.state.get(p, {}) for p in own]
    states = work.rule.kernel.states(work.groups[index])
    return Part(launches, _picker(params, own), entries, states)


def _all_params(work: Work) -> list[Tensor]:
    return list(chain.from_iterable([group["params"] for group in work.groups]))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return value if value is None else value.to(device, torch.float32, non_blocking=True)
