"""The one door to both paths: what is asked of them, kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agc_triton.nonfinite import SkippedUnits, check_finite
from agc_triton.norms import Clip
from agc_triton.options import check_levels
from agc_triton.routing import eligible, wants_triton
from agc_triton.rule import Batches, KernelRule, Rule, TensorLists, Work
from agc_triton.sharded import Kind, is_sharded
from agc_triton.snapshot import Cached
from agc_triton.torch_path import step as torch_path
from agc_triton.torch_path.merging import Merged, merged
from agc_triton.torch_path.plan import BlockPlan
from agc_triton.torch_path.split import SplitStep
from agc_triton.validation import check_gradients, check_group, check_options, check_shapes
from agc_triton.versions import count_writes

if TYPE_CHECKING:
    from agc_triton.triton_path.buckets import Bucket as Bucket
    from agc_triton.triton_path.plan import Preview as Preview
    from agc_triton.triton_path.plan import TritonPlan


class Paths:
    """What an optimizer keeps from step to step on both paths; it is never pickled."""

    def __init__(self) -> None:
        self.triton = TritonPath()
        self.blocks: dict[tuple[int, int], Cached[BlockPlan]] = {}
        self.skipped = SkippedUnits()

    def release(self) -> None:
        """Let go of states that have been replaced."""
        self.blocks = {}
        self.triton.release()

    def step(self, work: Work, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Check and plan everything on both paths, then update.

        Raises:
            RuntimeError, TypeError, ValueError: as `AGCOptimizer.step`; nothing has been changed.
        """
        capturing = is_capturing()
        check_levels(work.groups, work.own)
        if work.nonfinite == "raise":
            _check_finite(work, found_inf, capturing)
        skipped = self.skipped if work.nonfinite == "skip_unit" else None
        with _whole_states(work.state):
            check = partial(_check_all, work)
            plan = self.triton.prepare(work, check, skipped, capturing, "step()")
            rest = list(enumerate(work.groups)) if plan is None else plan.rest(work.groups)
            # A host sync on CUDA, as GradScaler itself has for optimizers it cannot fuse with.
            if rest and found_inf is not None and found_inf.item():
                rest = []
            split = SplitStep(work.rule, grad_scale)
            updates = self._prepare_blocks(work, rest, skipped, grad_scale, found_inf, split)
        split.begin()  # the first, as ranks may fail each other before anything has been written
        if plan is not None:
            plan.begin(grad_scale, found_inf, capturing)
            plan.update()
        for update in updates:
            update()
        split.update()

    def _prepare_blocks(
        self,
        work: Work,
        groups: list[tuple[int, dict[str, Any]]],
        skipped: SkippedUnits | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        split: SplitStep,
    ) -> list[Callable[[], None]]:
        """What updates these groups on the torch path, all of it checked before any of it runs."""
        scaler = None if grad_scale is None else grad_scale.reshape(()), found_inf
        together = merged(groups)
        # All states of all groups are created before any is updated.
        collected = [_collect(work, group) for _, group in together]
        for index, group in groups:
            check_options(group, index)
        updates: list[Callable[[], None]] = []
        used: set[tuple[int, int]] = set()
        for several, batches in zip(together, collected, strict=True):
            group, first = several.group, several.indices[0]
            clip = Clip.of(group, skipped) if work.needs_units(group) else None
            here = self._here(work, several, batches, clip, split, updates)
            for at, (lists, options) in enumerate(here):
                given = lists, options, clip
                if lists.params:
                    used.add((first, at))
                    plan = self._blocks_of((first, at), work, several, *given)
                    updates.append(torch_path.prepare(work.rule, plan, *given, *scaler))
        if groups and len(used) < len(self.blocks):  # a step that is skipped drops nothing
            self.blocks = {at: plan for at, plan in self.blocks.items() if at in used}
        return updates

    def _here(
        self,
        work: Work,
        several: Merged,
        batches: Batches,
        clip: Clip | None,
        split: SplitStep,
        updates: list[Callable[[], None]],
    ) -> Batches:
        """The batches, with the local tensors of DTensors whose units are whole on this rank.

        What is split between ranks goes to ``split``; autograd, which knows the DTensors, is told
        of the writes to all of them.
        """
        group = several.group
        if clip is None or not any(map(is_sharded, group["params"])):
            return batches
        _check(work, *several.indices)
        kinds = {id(param): work.kind_of(param, group) for param in group["params"]}
        split.add([p for p in group["params"] if kinds[id(p)] is Kind.SPLIT], clip)
        here: Batches = []
        for lists, options in batches:
            of_kind = {
                kind: lists.select([i for i, p in enumerate(lists.params) if kinds[id(p)] is kind])
                for kind in Kind
            }
            split.update_later(of_kind[Kind.SPLIT], options, clip)
            written = [*of_kind[Kind.WHOLE].params, *of_kind[Kind.SPLIT].params]
            updates.append(partial(count_writes, list(filter(is_sharded, written))))
            here += [(of_kind[Kind.WHOLE].local(), options), (of_kind[Kind.OTHER], options)]
        return here

    def _blocks_of(
        self, at: tuple[int, int], work: Work, several: Merged, *given: Any
    ) -> BlockPlan:
        def make() -> BlockPlan:
            _check(work, *several.indices)
            _bring_counts(work, *given[:2])
            return BlockPlan(*given)

        if at not in self.blocks:
            self.blocks[at] = Cached(views=True)
        return self.blocks[at].get(lambda plan: plan.look(*given), make)


class TritonPath:
    """The Triton path's plan, and what outlives it."""

    def __init__(self) -> None:
        self._cached: Cached[TritonPlan | None] = Cached()
        self._own: Any = None
        # What the replays of captured graphs read.
        self.captured: list[Any] = []

    @property
    def plan(self) -> TritonPlan | None:
        """The latest plan, unless it has been let go of."""
        return self._cached.plan

    def release(self) -> None:
        """Let go of the plan and the states it holds; graphs keep what they captured."""
        self._cached.drop()

    def prepare(
        self,
        work: Work,
        check: Callable[[], None],
        skipped: SkippedUnits | None,
        capturing: bool,
        what: str,
    ) -> TritonPlan | None:
        """The plan, ready to run, or None if nothing takes this path.

        Raises:
            RuntimeError: ``backend="triton"`` and a parameter that the kernels cannot take, or
                there is no plan and a CUDA graph is being captured (``what`` is to be).
            RuntimeError, TypeError, ValueError: what ``check`` raises before a plan is made.
        """

        def make() -> TritonPlan | None:
            if not any(wants_triton(work.backend, group) for group in work.groups):
                return None
            check()
            taken = [eligible(work, index) for index in range(len(work.groups))]
            if not any(taken):
                return None
            if capturing:  # plans need memory and copies that a capture allows none of
                raise RuntimeError(
                    f"a CUDA graph cannot capture {what} without a plan for these parameters,"
                    f" options and layouts of gradients; run {what} once on them before the capture"
                )
            # The wing imports Triton.
            from agc_triton.triton_path.plan import TritonPlan
            from agc_triton.triton_path.scalars import OwnScalars

            self._own = self._own or OwnScalars()
            return TritonPlan(work, taken, self._own, skipped, self.captured)

        return self._cached.get(
            lambda plan: plan.look(work), make, lambda plan: plan.write_tables(work)
        )


# A rule that updates no parameter: gradients alone are clipped.
CLIP = Rule(
    update=lambda lists, group: None,
    fused=lambda group, dtype: None,
    kernel=KernelRule(
        "clip",
        flags=lambda group: 0,
        states=lambda group: (),
        hyper=lambda group: (),
        prepared=0,
        writes_grad=True,
    ),
)


class Clipper:
    """Clips the gradients of parameter groups in place, with a plan that is kept between calls."""

    def __init__(self) -> None:
        self._triton = TritonPath()
        self._no_state: dict[Tensor, dict[str, Any]] = {}

    @property
    def captured(self) -> list[Any]:
        """What the replays of captured graphs read."""
        return self._triton.captured

    def clip_(self, groups: Sequence[dict[str, Any]], backend: str) -> None:
        """Clip dense gradients on both paths; they have been checked.

        Raises:
            RuntimeError: ``backend="triton"`` and a parameter that the kernels cannot take.
        """
        capturing = is_capturing()
        work = Work("", CLIP, groups, self._no_state, lambda group: [], backend, "propagate")
        plan = self._triton.prepare(work, lambda: None, None, capturing, "clipping")
        rest = list(enumerate(groups)) if plan is None else plan.rest(groups)
        if plan is not None:
            plan.begin(None, None, capturing)
            plan.update()
        for _, group in rest:
            params = [p for p in group["params"] if p.grad is not None]
            torch_path.clip_grads_(params, Clip.of(group))


def preview(work: Work, taken: Sequence[list[Tensor]]) -> list[Preview]:
    """What would be launched for these parameters of each group, with or without gradients."""
    if not any(taken):
        return []
    from agc_triton.triton_path.plan import preview as of_wing

    return of_wing(work, taken)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured; CUDA is asked only where it has been used."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's
    return initialized and torch.cuda.is_current_stream_capturing()


def _collect(work: Work, group: dict[str, Any]) -> Batches:
    """What has a gradient; where torch objects, our own checks speak first."""
    try:
        if torch.get_default_device().type == "cpu":
            return work.collect(group)
        # torch makes step counts on the default device, and would look for them on a CPU.
        with torch.device("cpu"):
            return work.collect(group)
    except Exception:
        _check_all(work)
        raise


def _bring_counts(work: Work, lists: TensorLists, options: Mapping[str, Any]) -> None:
    """Step counts that lie where torch would not take them are moved to their parameters.

    So they do after training on one device goes on on another.
    """
    if not lists.steps:
        return
    (key,) = work.rule.kernel.scalars
    beside = options.get("capturable") or options.get("fused")
    for i, (param, step) in enumerate(zip(lists.params, lists.steps, strict=True)):
        if step.device != param.device and (beside or not step.is_cpu):
            lists.steps[i] = work.state[param][key] = step.to(param.device)


def _check_all(work: Work) -> None:
    _check(work, *range(len(work.groups)))


def _check(work: Work, *indices: int) -> None:
    """Check groups before they are planned for."""
    for index in indices:
        group = work.groups[index]
        units = work.needs_units(group)
        check_group(group, index, units=units)
        if units:
            check_gradients(group, index, work.name, work.nonfinite)
        check_shapes(group, index, work.rule.kernel.states(group), work.state)


def _check_finite(work: Work, found_inf: Tensor | None, capturing: bool) -> None:
    if capturing:
        raise RuntimeError(
            "nonfinite='raise' waits for the device, which a CUDA graph cannot capture; use"
            " nonfinite='skip_unit'"
        )
    # GradScaler's overflows are a matter of course, and skip the step anyway.
    if found_inf is None or not found_inf.item():
        check_finite(work.groups)


@contextmanager
def _whole_states(state: MutableMapping[Tensor, Any]) -> Iterator[None]:
    """Take back the states that were created before something failed, out of memory say.

    What is half there, or there without its first update, would change the next step.
    """
    known = len(state)
    try:
        yield
    except BaseException:
        for param in list(state)[known:]:
            del state[param]
        raise
