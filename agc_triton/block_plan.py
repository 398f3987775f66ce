"""The torch path's plan of a step: blocks that are kept while their tensors stay where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.blocks import Block, Walk, blocks, find_walk
from agc_triton.layouts import Layouts
from agc_triton.rule import Clip, TensorLists


class Run(NamedTuple):
    """Blocks of one dtype that follow each other, and the indices of their tensors."""

    dtype: torch.dtype
    indices: list[int]
    blocks: list[Block]


class BlockPlan:
    """Blocks of what is updated together, and the indices of what cannot be walked.

    It holds views of parameters and states, so their memory lives until the plan is replaced; of
    gradients it holds none.
    """

    def __init__(self, lists: TensorLists, group: Mapping[str, Any], clip: Clip) -> None:
        self._options = _options(group, clip)
        self._length = len(lists.params)
        walks, self.whole = _partition(lists, group, clip)
        self.counted = list(walks)
        # Gradients that lie in memory as their parameters do, and all others each alone: those are
        # copied, so that no two copies are alive at a time.
        self._in_step: list[int] = []
        self.runs: list[Run] = []
        alike: defaultdict[torch.dtype, dict[int, Walk]] = defaultdict(dict)
        for i, walk in walks.items():
            param = lists.params[i]
            if lists.grads[i].stride() == param.stride():
                alike[param.dtype][i] = walk
                self._in_step.append(i)
            else:
                self._add_run(lists, {i: walk})
        for those in alike.values():
            self._add_run(lists, those)
        self._strides = [lists.params[i].stride() for i in self._in_step]
        self._layouts = [(run.indices, Layouts(_views(lists, run.indices))) for run in self.runs]
        self._addresses = self._find_addresses(lists)

    def _add_run(self, lists: TensorLists, walks: Mapping[int, Walk]) -> None:
        roles = [role for role in lists.states if role]
        dtype = lists.params[next(iter(walks))].dtype
        self.runs.append(Run(dtype, list(walks), blocks(walks, lists.params, roles)))

    def fits(self, lists: TensorLists, group: Mapping[str, Any], clip: Clip) -> bool:
        """Whether a new plan would be the same: nothing has moved or changed its layout."""
        return (
            len(lists.params) == self._length
            and _options(group, clip) == self._options
            and self._find_addresses(lists) == self._addresses
            and [lists.grads[i].stride() for i in self._in_step] == self._strides
            and all(layouts.fit(_views(lists, indices)) for indices, layouts in self._layouts)
        )

    def _find_addresses(self, lists: TensorLists) -> list[int]:
        return list(map(Tensor.data_ptr, _views(lists, self.counted)))


class BlockPlans:
    """The plans of an optimizer's groups."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, ...], BlockPlan] = {}

    def get(
        self, at: tuple[int, ...], lists: TensorLists, group: Mapping[str, Any], clip: Clip
    ) -> BlockPlan:
        """The plan at ``at``, made anew where it does not fit."""
        plan = self._plans.get(at)
        if plan is None or not plan.fits(lists, group, clip):
            # The old one first, as it may be all that holds on to its tensors.
            self._plans.pop(at, None)
            plan = self._plans[at] = BlockPlan(lists, group, clip)
        return plan


def _options(group: Mapping[str, Any], clip: Clip) -> tuple[Any, ...]:
    return bool(group.get("foreach") or group.get("differentiable")), clip.unit_dim


def _views(lists: TensorLists, indices: list[int]) -> list[Tensor]:
    """Parameters and states at these indices."""
    roles = (lists.params, *(role for role in lists.states if role))
    return [role[i] for role in roles for i in indices]


def _partition(
    lists: TensorLists, group: Mapping[str, Any], clip: Clip
) -> tuple[dict[int, Walk], list[int]]:
    """Which parameters go in blocks, and which whole."""
    walks: dict[int, Walk] = {}
    whole: list[int] = []
    whatever, _ = _options(group, clip)
    roles = [role for role in lists.states if role]
    for i, param in enumerate(lists.params):
        walk = None if whatever else find_walk(param, [role[i] for role in roles], clip.unit_dim)
        if walk is None:
            whole.append(i)
        else:
            walks[i] = walk
    return walks, whole
