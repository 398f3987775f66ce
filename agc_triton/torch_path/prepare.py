"""The torch path of a step: what of each parameter group goes in blocks, whole, or over ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.exchange import Sharding
from agc_triton.norms import Clip
from agc_triton.records import Recording
from agc_triton.rule import Batches, TensorLists, Work
from agc_triton.sharded import Kind, local
from agc_triton.snapshot import Cached
from agc_triton.torch_path.clip import clip_grads_
from agc_triton.torch_path.merging import Merged, merged
from agc_triton.torch_path.plan import BlockPlan
from agc_triton.torch_path.split import SplitPlan, prepare_split
from agc_triton.torch_path.step import prepare_group, track_unclipped
from agc_triton.validation import check_options, check_planned, check_work
from agc_triton.versions import count_writes

Call = Callable[[], Any]
# Parameters as the optimizer knows them, what of them is updated together here, and its options.
Parts = list[tuple[TensorLists, TensorLists, Mapping[str, Any]]]


class Beats:
    """What the torch path does: before sums go over ranks, meanwhile, and when they are there."""

    def __init__(self) -> None:
        self.first: list[Call] = []
        self.meanwhile: list[Call] = []
        self.last: list[Call] = []

    def begin(self) -> None:
        """Sum what is split between ranks."""
        _call(self.first)

    def update(self) -> None:
        """Clip and update what is whole here."""
        _call(self.meanwhile)

    def finish(self) -> None:
        """Clip and update what is split, whose totals are there."""
        _call(self.last)


class Given(NamedTuple):
    """What a step is made with: what is recorded, DTensors, GradScaler's tensors."""

    recording: Recording
    sharding: Sharding
    grad_scale: Tensor | None
    found_inf: Tensor | None


class TorchPath:
    """What the torch path keeps from step to step."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], Cached[BlockPlan]] = {}
        self._split: dict[int, Cached[SplitPlan]] = {}

    def release(self) -> None:
        """Let go of states that have been replaced."""
        self.blocks, self._split = {}, {}

    def prepare(self, work: Work, groups: list[tuple[int, dict[str, Any]]], given: Given) -> Beats:
        """What updates these groups, all of it checked before any of it runs.

        Raises:
            RuntimeError, TypeError, ValueError: as `AGCOptimizer.step`; nothing has been changed.
        """
        beats, scale, found_inf = Beats(), given.grad_scale, given.found_inf
        if not groups:
            self.release()
            return beats
        # A host sync on CUDA, as GradScaler itself has for optimizers it cannot fuse with.
        if found_inf is not None and found_inf.item():
            return beats
        scaler = None if scale is None else scale.reshape(()), found_inf
        together = merged(groups)
        # All states of all groups are created before any is updated.
        collected = _collect(work, [group for _, group in together])
        for index, group in groups:
            check_options(group, index)
        used: set[tuple[int, int]] = set()
        for several, batches in zip(together, collected, strict=True):
            clip = (
                Clip.of(several.group, given.recording) if work.needs_units(several.group) else None
            )
            parts = [(lists, lists, options) for lists, options in batches]
            if given.sharding.kinds:
                factors = self._factors(work, several, given, beats)
                parts = _parts(work, batches, clip, given.sharding, factors, beats)
            for at, (owners, lists, options) in enumerate(parts):
                these = lists, options, clip
                if lists.params:
                    used.add((several.indices[0], at))
                    plan = self._blocks_of(
                        (several.indices[0], at), work, several, given.recording, owners, *these
                    )
                    beats.meanwhile += _tracked(plan, *these, given)
                    beats.meanwhile.append(prepare_group(work.rule, plan, *these, *scaler))
        if len(used) < len(self.blocks):
            self.blocks = {at: plan for at, plan in self.blocks.items() if at in used}
        return beats

    def prepare_clipping(
        self,
        work: Work,
        groups: list[tuple[int, dict[str, Any]]],
        given: Given,
    ) -> Beats:
        """What clips the gradients of these groups in place; they have been checked."""
        beats, recording = Beats(), given.recording
        for index, group in groups:
            clip, kinds = Clip.of(group, recording), given.sharding.kinds
            factors = self._factors(work, Merged([index], group), given, beats)
            whole, split = list[Tensor](), list[Tensor]()
            for param in group["params"]:
                if param.grad is not None:
                    (split if kinds.get(id(param)) is Kind.SPLIT else whole).append(param)
            beats.meanwhile.append(partial(clip_grads_, whole, clip, kinds, recording))
            if split:
                beats.last.append(partial(_scale_split_, split, factors))
        return beats

    def _factors(
        self, work: Work, several: Merged, given: Given, beats: Beats
    ) -> Callable[[], Mapping[int, Tensor]]:
        """What gives the factors of a group's split units once these have been summed."""
        exchange, group = given.sharding.exchange, several.group
        split = [p for p in group["params"] if exchange is not None and exchange.place(p)]
        if exchange is None or not split:
            return dict
        clip, recording = Clip.of(group, given.recording), given.recording
        of_plan = split, exchange, clip.unit_dim, recording.of_plans

        def make() -> SplitPlan:
            check_planned(work, *several.indices)
            return SplitPlan(*of_plan)

        cached = self._split.setdefault(several.indices[0], Cached())
        plan = cached.get(lambda plan: plan.look(*of_plan), make)
        beats.first.append(partial(plan.begin, split, given.grad_scale))
        factors = partial(plan.factors, split, clip, given.grad_scale, recording.number)
        return functools.cache(factors)

    def _blocks_of(
        self,
        at: tuple[int, int],
        work: Work,
        several: Merged,
        recording: Recording,
        owners: TensorLists,
        lists: TensorLists,
        options: Mapping[str, Any],
        clip: Clip | None,
    ) -> BlockPlan:
        of_plan = lists, options, clip, recording.of_plans

        def make() -> BlockPlan:
            check_planned(work, *several.indices)
            _bring_counts(work, owners, options)
            return BlockPlan(*of_plan, owners.params)

        if at not in self.blocks:
            self.blocks[at] = Cached(views=True)
        return self.blocks[at].get(lambda plan: plan.look(*of_plan), make)


def _tracked(
    plan: BlockPlan,
    lists: TensorLists,
    options: Mapping[str, Any],
    clip: Clip | None,
    given: Given,
) -> list[Call]:
    """What keeps the ratios of a tracked step, but for those that clipping itself keeps."""
    if given.recording.number is None:
        return []
    calls: list[Call] = [partial(plan.number, given.recording.number)]
    if clip is None:
        unclipped = Clip.of(options, given.recording)
        calls.append(partial(track_unclipped, plan, lists, unclipped, given.grad_scale))
    return calls


def _call(calls: list[Call]) -> None:
    for call in calls:
        call()


def _parts(
    work: Work,
    batches: Batches,
    clip: Clip | None,
    sharding: Sharding,
    factors: Callable[[], Mapping[int, Tensor]],
    beats: Beats,
) -> Parts:
    """The batches, and what of them lies here, without what is split between ranks.

    That has its own beat. Autograd knows DTensors, not what lies here, and is told of the writes.
    """
    here: Parts = []
    for lists, options in batches:
        kinds = [sharding.kinds.get(key, Kind.WHOLE) for key in map(id, lists.params)]
        whole, split, other = (
            lists.select([i for i, own in enumerate(kinds) if own is kind]) for kind in Kind
        )
        if split.params and clip is None:  # its sums are for its ratios alone
            beats.last.append(factors)
            at = [i for i, own in enumerate(kinds) if own is not Kind.OTHER]
            whole, split = lists.select(at), lists.select([])
        if split.params:
            assert clip is not None
            _bring_counts(work, split, options)
            beats.last.append(prepare_split(work.rule, split, options, clip, factors))
        written = [p for p in (*whole.params, *split.params) if id(p) in sharding.kinds]
        beats.meanwhile.append(partial(count_writes, written))
        here += [(whole, whole.local(), options), (other, other, options)]
    return here


def _scale_split_(params: list[Tensor], factors: Callable[[], Mapping[int, Tensor]]) -> None:
    """Clip gradients in place; parts that are empty here have no factors."""
    found = factors()
    for param in params:
        if id(param) in found:
            grad = local(param.grad)
            grad.copy_(grad * found[id(param)])


def _collect(work: Work, groups: list[dict[str, Any]]) -> list[Batches]:
    """What of each has a gradient; where torch objects, our own checks speak first."""
    on_cpu = torch.get_default_device().type == "cpu"
    try:
        # torch makes step counts on the default device, and would look for them on a CPU.
        with nullcontext() if on_cpu else torch.device("cpu"):
            return [work.collect(group) for group in groups]
    except Exception:
        check_work(work)
        raise


def _bring_counts(work: Work, lists: TensorLists, options: Mapping[str, Any]) -> None:
    """Step counts and other scalars that lie where torch would not take them are moved.

    To their parameters: so they lie after training on one device goes on on another.
    """
    beside = options.get("capturable") or options.get("fused")
    for key, role in zip(work.rule.kernel.scalars, (lists.steps, *lists.scalars), strict=False):
        for i, (param, scalar) in enumerate(zip(lists.params, role, strict=True)):
            if scalar.device != param.device and (beside or not scalar.is_cpu):
                role[i] = work.state[param][key] = scalar.to(param.device)
