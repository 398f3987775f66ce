"""Plans on the Triton path: which tensors go through the kernels together, kept until stale."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.rule import KernelRule, Work
from agc_triton.triton_path.tables import CLIP_ONLY, FusedStep, Member
from agc_triton.units import memory_order
from agc_triton.validation import check_grad, check_states
from agc_triton.versions import count_writes


class PlannedStep(NamedTuple):
    """A fused step and what it is run on.

    ``keys`` name, in the parameters' ``entries`` of optimizer.state, the step count, if they have
    one, and the states that lie in the tables. A parameter without a gradient stays while it has
    states, so that the plan stays too.
    """

    step: FusedStep
    params: list[Tensor]
    entries: list[dict[str, Any]]
    keys: tuple[str, ...]

    def fits(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the entries hold what the tables do; these are then up to date."""
        try:
            held = [list(map(itemgetter(key), self.entries)) for key in self.keys]
        except KeyError:
            return False
        return self.step.refresh(self.params, held, groups)


class OptimizerPlan:
    """What `AGCOptimizer.step` launches, over the parameters that ``eligible`` admits.

    Args:
        work: states of parameters with a gradient are created.
        eligible: per group, the parameters that the kernels can take.
        launcher: `agc_triton.triton_path.launches.StepLauncher`.
        previous: the plan before, whose step counts carry over.
        captured: as of `FusedStep`.
    """

    def __init__(
        self,
        work: Work,
        eligible: Sequence[list[Tensor]],
        launcher: Callable[..., Any],
        previous: OptimizerPlan | None,
        captured: list[Any],
    ) -> None:
        self._how = work.nonfinite, work.backend
        self._grouped = [list(group["params"]) for group in work.groups]
        self._state: Any = work.state
        # Counts that no entry of the state holds go with the state that they were made for.
        same_state = previous is not None and previous._state is work.state
        self._previous = previous if same_state else None
        self._rest = [
            [p for p in group["params"] if p not in taken]
            for group, taken in zip(work.groups, map(set, eligible), strict=True)
        ]
        self.counts: dict[Tensor, Tensor] = {}
        self._first: set[Tensor] = set()
        self.idle: list[Tensor] = []
        members: dict[tuple[Any, ...], list[Member]] = {}
        for index, params in enumerate(eligible):
            for member in self._members(work, index, params):
                group = work.groups[index]
                flags = work.rule.kernel.flags(group)
                key = (member.param.device, member.param.dtype, flags, len(member.states))
                members.setdefault(key, []).append(member)
        self.steps = [self._planned(work, list_, launcher, captured) for list_ in members.values()]
        self._previous = None
        self._entries = list(work.state.values())

    def _members(self, work: Work, index: int, params: list[Tensor]) -> list[Member]:
        """Parameters with a gradient or states; these are created and laid out as they are."""
        group, rule = work.groups[index], work.rule.kernel
        # Step counts belong on the device, and clipping=0 differs only in its limit there.
        options = {**group, "params": params, "fused": None, "capturable": True}
        options["clipping"] = group["clipping"] or torch.inf
        for lists, given in work.collect(options):
            if given.get("is_first_step"):
                self._first.update(lists.params)
        position = {param: i for i, param in enumerate(group["params"])}
        members = []
        for param in params:
            entry, at = work.state.get(param, {}), (group, index, position[param])
            if param.grad is not None:
                check_grad(param, param.grad, *at)
            elif not _has_states(entry, rule, group):
                self.idle.append(param)
                continue
            keys = rule.states(group)
            check_states(param, {key: entry[key] for key in keys}, *at)
            states = tuple(_laid_out_as(param, entry, key) for key in keys)
            members.append(Member(param, states, index))
        return members

    def _planned(
        self,
        work: Work,
        members: list[Member],
        launcher: Callable[..., Any],
        captured: list[Any],
    ) -> PlannedStep:
        groups, rule = work.groups, work.rule.kernel
        params = [member.param for member in members]
        entries = [work.state.get(p, {}) for p in params]
        if rule.counts:
            given = [entry["step"] for entry in entries]
        else:
            given = list(map(self._count, params))
        counts = _on_device(given, params[0].device)
        self.counts.update(zip(params, counts, strict=True))
        held = counts if rule.counts else []
        for entry, count in zip(entries, held, strict=bool(held)):
            entry["step"] = count
        step = FusedStep(rule, members, groups, counts, launcher, captured)
        keys = rule.states(groups[members[0].group])
        return PlannedStep(step, params, entries, ("step", *keys) if rule.counts else keys)

    def _count(self, param: Tensor) -> Tensor:
        """The step count of a parameter whose state has none."""
        known = {} if self._previous is None else self._previous.counts
        if param in known and param not in self._first:
            return known[param]
        return torch.tensor(float(param not in self._first), device="cpu")

    def rest(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Groups of the parameters that take the torch path."""
        pairs = zip(groups, self._rest, strict=True)
        return [{**group, "params": params} for group, params in pairs if params]

    def refresh(self, work: Work) -> bool:
        """Whether the plan fits what the optimizer holds now; its tables are then up to date."""
        groups, state = work.groups, work.state
        if state is not self._state or len(groups) != len(self._grouped):
            return False
        if (work.nonfinite, work.backend) != self._how:
            return False
        for group, params in zip(groups, self._grouped, strict=True):
            if len(group["params"]) != len(params) or not all(map(is_, group["params"], params)):
                return False
        if len(state) != len(self._entries) or not all(map(is_, state.values(), self._entries)):
            return False
        if any(p.grad is not None for p in self.idle):
            return False
        return all(planned.fits(groups) for planned in self.steps)

    def release(self) -> None:
        """Let go of states that have been replaced; the plan fits nothing any more."""
        self.steps, self._entries, self._state = [], [], None

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        """Launch everything."""
        for planned in self.steps:
            device = planned.step.device
            count_writes([p for p in planned.params if p.grad is not None])
            with _current(device):
                planned.step.run(_on(grad_scale, device), _on(found_inf, device), capturing)


class ClipPlan:
    """Clips the gradients of groups of parameters, none of which it keeps alive.

    Args:
        groups: ``params``, ``clipping``, ``agc_eps`` and ``unit_dim`` of each.
        eligible: per group, the parameters that the kernels can take.
        launcher: `agc_triton.triton_path.launches.StepLauncher`.
        captured: as of `FusedStep`.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        eligible: Sequence[list[Tensor]],
        launcher: Callable[..., Any],
        captured: list[Any],
    ) -> None:
        members: defaultdict[tuple[Any, ...], list[Member]] = defaultdict(list)
        for index, params in enumerate(eligible):
            for param in params:
                members[param.device, param.dtype].append(Member(param, (), index))
        self._steps: list[tuple[FusedStep, list[weakref.ref[Tensor]]]] = []
        for list_ in members.values():
            counts = torch.zeros(len(list_), device=list_[0].param.device, dtype=torch.float32)
            step = FusedStep(CLIP_ONLY, list_, groups, counts.unbind(), launcher, captured)
            self._steps.append((step, [weakref.ref(member.param) for member in list_]))

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the plan fits these groups; its tables are then up to date."""
        for step, refs in self._steps:
            params = [p for p in (ref() for ref in refs) if p is not None]
            if len(params) != len(refs) or not step.refresh(params, [], groups):
                return False
        return True

    def run(self, capturing: bool) -> None:
        """Launch everything."""
        for step, refs in self._steps:
            params = [p for p in (ref() for ref in refs) if p is not None]
            count_writes([p.grad for p in params if p.grad is not None])
            with _current(step.device):
                step.run(None, None, capturing)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return value if value is None else value.to(device, torch.float32, non_blocking=True)


def _has_states(entry: Mapping[str, Any], rule: KernelRule, group: Mapping[str, Any]) -> bool:
    keys = (*rule.states(group), *(("step",) if rule.counts else ()))
    return all(isinstance(entry.get(key), Tensor) for key in keys)


def _laid_out_as(param: Tensor, entry: dict[str, Any], key: str) -> Tensor:
    """A state; where it is not in the parameter's memory order, a copy takes its place."""
    state: Tensor = entry[key]
    if memory_order(state) == memory_order(param) and not (state.is_conj() or state.is_neg()):
        return state
    entry[key] = torch.empty_like(param).copy_(state)
    return _laid_out_as(param, entry, key)


def _on_device(counts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Step counts in fp32 on a device; those that are stay, as a captured graph may count them."""
    fits = [count.device == device and count.dtype == torch.float32 for count in counts]
    others = [
        count.detach().reshape(()) for count, fit in zip(counts, fits, strict=True) if not fit
    ]
    if not others:
        return counts
    first = others[0].device
    moved = torch.stack([count.to(first, torch.float32) for count in others]).to(device).unbind()
    rest = iter(moved)
    return [count if fit else next(rest) for count, fit in zip(counts, fits, strict=True)]
