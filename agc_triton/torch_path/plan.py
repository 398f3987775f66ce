"""The torch path's plan of a step: blocks that are kept while their tensors stay where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from agc_triton.norms import Clip
from agc_triton.rule import TensorLists, at
from agc_triton.snapshot import Layouts
from agc_triton.torch_path.blocks import blocks, largest_room
from agc_triton.torch_path.slices import Walk, find_walk


class Run:
    """Blocks of one dtype that follow each other, and the indices of their tensors.

    ``alike`` says that every gradient lies in memory as its parameter does.
    """

    def __init__(self, lists: TensorLists, walks: Mapping[int, Walk], alike: bool) -> None:
        self.indices, self.alike = list(walks), alike
        self.dtype = lists.params[self.indices[0]].dtype
        # Views of the tensors themselves would follow where their .data is set, and would keep them
        # from being swapped (torch.utils.swap_tensors).
        params, *states = (
            {i: role[i].data for i in walks} if role else {}
            for role in (lists.params, *lists.states)
        )
        self.blocks = blocks(walks, params, states)
        self.largest_room = largest_room(self.blocks)
        tensors = self._tensors(lists)
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._memory = list(map(Tensor.untyped_storage, tensors))
        self._starts = list(map(UntypedStorage.data_ptr, self._memory))
        self._layouts = Layouts(tensors + self._grads(lists))

    def fits(self, lists: TensorLists) -> bool:
        """Whether no tensor has moved or changed its layout, and the blocks' memory is there."""
        tensors = self._tensors(lists)
        stayed = list(map(Tensor.data_ptr, tensors)) == self._addresses
        # A tensor may lie where memory was that resize_(0) has freed since.
        there = list(map(UntypedStorage.data_ptr, self._memory)) == self._starts
        return stayed and there and self._layouts.fit(tensors + self._grads(lists))

    def _tensors(self, lists: TensorLists) -> list[Tensor]:
        roles = (lists.params, *lists.states)
        return [tensor for role in roles for tensor in at(self.indices, role)]

    def _grads(self, lists: TensorLists) -> list[Tensor]:
        """Those that are walked as they lie."""
        return at(self.indices, lists.grads) if self.alike else []


class BlockPlan:
    """Runs of what is updated together, and the indices of what cannot be walked.

    It holds views of parameters and states, so their memory lives until the plan is replaced; of
    gradients it holds none.
    """

    def __init__(self, lists: TensorLists, group: Mapping[str, Any], clip: Clip) -> None:
        self._options = _options(group, clip)
        self._length = len(lists.params)
        walks, self.whole = _partition(lists, group, clip)
        self.counted = list(walks)
        self._whole_layouts, self._repeated = Layouts(self._whole(lists)), _repeated(lists)
        alike: defaultdict[torch.dtype, dict[int, Walk]] = defaultdict(dict)
        others: list[dict[int, Walk]] = []
        for i, walk in walks.items():
            param = lists.params[i]
            if lists.grads[i].stride() == param.stride():
                alike[param.dtype][i] = walk
            else:  # copied, and each alone so that no two copies are alive at a time
                others.append({i: walk})
        self.runs = [Run(lists, those, alike=True) for those in alike.values()]
        self.runs += [Run(lists, one, alike=False) for one in others]

    def fits(self, lists: TensorLists, group: Mapping[str, Any], clip: Clip) -> bool:
        """Whether a new plan would be the same."""
        return (
            len(lists.params) == self._length
            and _options(group, clip) == self._options
            and all(run.fits(lists) for run in self.runs)
            and (not self.whole or self._still_whole(lists))
        )

    def _still_whole(self, lists: TensorLists) -> bool:
        """Whether what was not in blocks would not be now; its states have passed the checks."""
        same = self._whole_layouts.fit(self._whole(lists))
        return same and _repeated(lists) == self._repeated

    def _whole(self, lists: TensorLists) -> list[Tensor]:
        """Parameters and states of what is not in blocks."""
        roles = (lists.params, *lists.states)
        return [tensor for role in roles for tensor in at(self.whole, role)]


class BlockPlans:
    """The plans of an optimizer's groups."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], BlockPlan] = {}

    def drop(self, at: tuple[int, ...]) -> None:
        """Let go of the plan at ``at``, if there is one."""
        self._plans.pop(at, None)

    def get(
        self,
        at: tuple[int, ...],
        lists: TensorLists,
        group: Mapping[str, Any],
        clip: Clip,
        check: Callable[[list[Tensor], Mapping[str, Any]], None],
    ) -> BlockPlan:
        """The plan at ``at``, made anew where it does not fit and ``check`` does not raise."""
        plan = self._plans.get(at)
        if plan is None or not plan.fits(lists, group, clip):
            check(lists.params, group)
            # The old one first, as it may be all that holds on to its tensors.
            self._plans.pop(at, None)
            # Memory that is made in inference mode cannot be written to outside of it.
            with torch.inference_mode(False):
                plan = self._plans[at] = BlockPlan(lists, group, clip)
        return plan


def _options(group: Mapping[str, Any], clip: Clip) -> tuple[Any, ...]:
    # On a CPU torch refuses capturable that is not fused, and does so before it counts a step.
    capturable = group.get("capturable") and not group.get("fused")
    return bool(group.get("foreach") or group.get("differentiable") or capturable), clip.unit_dim


def _repeated(lists: TensorLists) -> bool:
    """Whether a parameter is there twice."""
    return len(set(map(id, lists.params))) < len(lists.params)


def _partition(
    lists: TensorLists, group: Mapping[str, Any], clip: Clip
) -> tuple[dict[int, Walk], list[int]]:
    """Which parameters go in blocks, and which whole."""
    walks: dict[int, Walk] = {}
    whole: list[int] = []
    all_whole, _ = _options(group, clip)
    # A parameter that is there twice is updated by each update in turn, as torch's for-loop does.
    all_whole |= _repeated(lists) and not group.get("fused")
    roles = [role for role in lists.states if role]
    for i, param in enumerate(lists.params):
        walk = None if all_whole else find_walk(param, [role[i] for role in roles], clip.unit_dim)
        if walk is None:
            whole.append(i)
        else:
            walks[i] = walk
    return walks, whole
