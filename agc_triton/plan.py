"""Plans on the Triton path: which tensors go through the kernels together, kept until stale."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.fused import CLIP_ONLY, FusedStep, Member
from agc_triton.units import memory_order
from agc_triton.validation import check_grad, check_states

if TYPE_CHECKING:
    from agc_triton.optim.optimizer import AGCOptimizer


class PlannedStep(NamedTuple):
    """A fused step and what it is run on.

    ``counts`` are the entries' step counts, if they have any, ``counted`` their addresses;
    ``states`` has, per role, its key in the parameters' ``entries`` of optimizer.state and the
    tensors that lie in the tables; ``single`` are the indices of one-element parameters.
    """

    step: FusedStep
    params: list[Tensor]
    entries: list[dict[str, Any]]
    counts: list[Tensor]
    counted: list[int]
    states: list[tuple[str, list[Tensor]]]
    single: list[int]


class OptimizerPlan:
    """What `AGCOptimizer.step` launches, over the parameters that ``eligible`` admits.

    Args:
        optimizer: the optimizer; states of parameters with a gradient are created.
        eligible: per group, the parameters that the kernels can take.
        launcher: `agc_triton.kernels.launch.StepLauncher`.
        previous: the plan before, whose step counts carry over.
    """

    def __init__(
        self,
        optimizer: AGCOptimizer,
        eligible: Sequence[list[Tensor]],
        launcher: Callable[..., Any],
        previous: OptimizerPlan | None,
    ) -> None:
        self._nonfinite = optimizer.nonfinite
        self._grouped = [list(group["params"]) for group in optimizer.param_groups]
        # Graphs captured with earlier plans still read those plans' tables.
        self._captured = [] if previous is None else previous.captured()
        self._state: Any = optimizer.state
        # Counts that no entry of the state holds go with the state that they were made for.
        same_state = previous is not None and previous._state is optimizer.state
        self._previous = previous if same_state else None
        self._rest = [
            [p for p in group["params"] if p not in taken]
            for group, taken in zip(optimizer.param_groups, map(set, eligible), strict=True)
        ]
        self.counts: dict[Tensor, Tensor] = {}
        self.idle = [p for params in eligible for p in params if p.grad is None]
        members: dict[tuple[Any, ...], list[Member]] = {}
        for index, params in enumerate(eligible):
            for member in self._members(optimizer, index, params):
                group = optimizer.param_groups[index]
                flags = optimizer.rule.kernel.flags(group)
                key = (member.param.device, member.param.dtype, flags, len(member.states))
                members.setdefault(key, []).append(member)
        self.steps = [self._planned(optimizer, list_, launcher) for list_ in members.values()]
        self._previous = None
        self._entries = list(optimizer.state.values())

    def _members(self, optimizer: AGCOptimizer, index: int, params: list[Tensor]) -> list[Member]:
        """Parameters with a gradient, their states created and laid out as they are."""
        group = optimizer.param_groups[index]
        # Step counts belong on the device, and clipping=0 differs only in its limit there.
        options = {**group, "params": params, "fused": None, "capturable": True}
        options["clipping"] = group["clipping"] or torch.inf
        position = {param: i for i, param in enumerate(group["params"])}
        members = []
        for lists, given in optimizer._batches(options):
            for i, param in enumerate(lists.params):
                entry = optimizer.state.get(param, {})
                check_grad(param, lists.grads[i], group, index, position[param])
                check_states(param, entry, group, index, position[param])
                states = tuple(role[i] for role in lists.states if role)
                states = tuple(_laid_out_as(param, state, entry) for state in states)
                if lists.steps:
                    self.counts[param] = lists.steps[i]
                elif given.get("is_first_step"):
                    self.counts[param] = torch.tensor(0.0, device="cpu")
                elif self._previous is not None and param in self._previous.counts:
                    self.counts[param] = self._previous.counts[param]
                else:
                    self.counts[param] = torch.tensor(1.0, device="cpu")
                members.append(Member(param, states, index))
        return members

    def _planned(
        self, optimizer: AGCOptimizer, members: list[Member], launcher: Callable[..., Any]
    ) -> PlannedStep:
        params = [member.param for member in members]
        counts = _one_vector([self.counts[p] for p in params], params[0].device)
        for param, count in zip(params, counts.unbind(), strict=True):
            self.counts[param] = count
            if "step" in (entry := optimizer.state.get(param, {})):
                entry["step"] = count
        groups = optimizer.param_groups
        step = FusedStep(optimizer.rule.kernel, members, groups, counts, launcher)
        entries = [optimizer.state.get(p, {}) for p in params]
        states = []
        for tensors in zip(*(member.states for member in members), strict=True):
            key = next(key for key, value in entries[0].items() if value is tensors[0])
            states.append((key, list(tensors)))
        single = [i for i, p in enumerate(params) if p.numel() == 1]
        held = [entry["step"] for entry in entries if "step" in entry]
        counted = list(map(Tensor.data_ptr, held))
        return PlannedStep(step, params, entries, held, counted, states, single)

    def rest(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Groups of the parameters that take the torch path."""
        pairs = zip(groups, self._rest, strict=True)
        return [{**group, "params": params} for group, params in pairs if params]

    def captured(self) -> list[FusedStep]:
        """Steps that a captured graph may replay."""
        return self._captured + [planned.step for planned in self.steps if planned.step.frozen]

    def refresh(self, optimizer: AGCOptimizer) -> bool:
        """Whether the plan fits what the optimizer holds now; its tables are then up to date."""
        groups, state = optimizer.param_groups, optimizer.state
        if state is not self._state or len(groups) != len(self._grouped):
            return False
        if optimizer.nonfinite != self._nonfinite:
            return False
        for group, params in zip(groups, self._grouped, strict=True):
            if len(group["params"]) != len(params) or not all(map(is_, group["params"], params)):
                return False
        if len(state) != len(self._entries) or not all(map(is_, state.values(), self._entries)):
            return False
        if any(p.grad is not None for p in self.idle):
            return False
        for step, params, entries, counts, counted, states, single in self.steps:
            if step.frozen:  # a graph replays its tables
                return False
            if counts and not all(map(is_, map(itemgetter("step"), entries), counts)):
                return False
            if list(map(Tensor.data_ptr, counts)) != counted:
                return False
            for key, tensors in states:
                if not _same_tensors(entries, key, tensors, single):
                    return False
            if not step.refresh(params, [tensors for _, tensors in states], groups):
                return False
        return True

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        """Launch everything."""
        for planned in self.steps:
            device = planned.params[0].device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                planned.step.run(_on(grad_scale, device), _on(found_inf, device), capturing)


class ClipPlan:
    """Clips the gradients of groups of parameters, none of which it keeps alive.

    Args:
        groups: ``params``, ``clipping``, ``agc_eps`` and ``unit_dim`` of each.
        eligible: per group, the parameters that the kernels can take.
        launcher: `agc_triton.kernels.launch.StepLauncher`.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        eligible: Sequence[list[Tensor]],
        launcher: Callable[..., Any],
    ) -> None:
        members: defaultdict[tuple[Any, ...], list[Member]] = defaultdict(list)
        for index, params in enumerate(eligible):
            for param in params:
                members[param.device, param.dtype].append(Member(param, (), index))
        self._steps: list[tuple[FusedStep, list[weakref.ref[Tensor]]]] = []
        for list_ in members.values():
            counts = torch.zeros(len(list_), device=list_[0].param.device)
            step = FusedStep(CLIP_ONLY, list_, groups, counts, launcher)
            self._steps.append((step, [weakref.ref(member.param) for member in list_]))

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the plan fits these groups; its tables are then up to date."""
        for step, refs in self._steps:
            params = [p for p in (ref() for ref in refs) if p is not None]
            if len(params) != len(refs) or not step.refresh(params, [], groups):
                return False
        return True

    def run(self) -> None:
        """Launch everything."""
        for step, _ in self._steps:
            step.run(None, None, False)


def _same_tensors(
    entries: list[dict[str, Any]], key: str, before: list[Tensor], single: list[int]
) -> bool:
    """Whether entries hold the same tensors; ``single`` are the indices of one-element ones.

    List equality stops at identity where it can, several times faster than asking each for it. For
    other tensors it raises, but for those of one element, whose values it would compare.
    """
    try:
        now = list(map(itemgetter(key), entries))
        return now == before and all(now[i] is before[i] for i in single)
    except (KeyError, RuntimeError):
        return False


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return value if value is None else value.to(device, torch.float32, non_blocking=True)


def _laid_out_as(param: Tensor, state: Tensor, entry: dict[str, Any]) -> Tensor:
    """The state, or a copy in the parameter's memory order that replaces it in its entry."""
    if memory_order(state) == memory_order(param):
        return state
    role = next(key for key, value in entry.items() if value is state)
    entry[role] = torch.empty_like(param).copy_(state)
    fresh: Tensor = entry[role]
    return fresh


def _one_vector(counts: list[Tensor], device: torch.device) -> Tensor:
    """Step counts as one fp32 vector, so that one kernel counts them all."""
    base = counts[0]._base
    if (
        base is not None
        and base.shape == (len(counts),)
        and base.dtype == torch.float32
        and base.device == device
        and all(c.data_ptr() == base.data_ptr() + 4 * i for i, c in enumerate(counts))
    ):
        return base
    return torch.stack([c.detach().to(device, torch.float32) for c in counts])
