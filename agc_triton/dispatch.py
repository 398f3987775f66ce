"""The one door to both paths: what is asked of them, kept from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from agc_triton.nonfinite import SkippedUnits, check_finite
from agc_triton.norms import Clip
from agc_triton.routing import eligible, launches
from agc_triton.rule import Batches, Work
from agc_triton.torch_path import step as torch_path
from agc_triton.torch_path.plan import BlockPlans
from agc_triton.triton_path.buckets import Bucket as Bucket
from agc_triton.triton_path.buckets import TensorUnits, plan_buckets
from agc_triton.triton_path.plan import ClipPlan, OptimizerPlan
from agc_triton.triton_path.tables import ALIGNMENT, kernel_layout
from agc_triton.validation import (
    CheckedGroups,
    check_grad,
    check_group,
    check_options,
    check_shapes,
    tensor_name,
)


@contextmanager
def whole_states(state: MutableMapping[Tensor, Any]) -> Iterator[None]:
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


def limited(group: dict[str, Any], nonfinite: str) -> dict[str, Any]:
    """The group; without clipping an infinite limit where units are needed all the same."""
    if group["clipping"] or nonfinite != "skip_unit":
        return group
    return {**group, "clipping": math.inf}


class Paths:
    """What an optimizer keeps from step to step on both paths; it is never pickled."""

    def __init__(self) -> None:
        self.plan: OptimizerPlan | None = None
        self.blocks, self.checked = BlockPlans(), CheckedGroups()
        self.skipped = SkippedUnits()
        self.captured: list[Any] = []  # as of FusedStep

    def release(self) -> None:
        """Let go of states that have been replaced; graphs keep what they captured."""
        self.blocks = BlockPlans()
        if self.plan is not None:
            self.plan.release()

    def step(self, work: Work, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Check and plan everything on both paths, then update.

        Raises:
            RuntimeError, TypeError, ValueError: as `AGCOptimizer.step`; nothing has been changed.
        """
        capturing = is_capturing()
        if work.nonfinite == "raise":
            if capturing:
                raise RuntimeError(
                    "nonfinite='raise' waits for the device, which a CUDA graph cannot capture; use"
                    " nonfinite='skip_unit'"
                )
            # GradScaler's overflows are a matter of course, and skip the step anyway.
            if found_inf is None or not found_inf.item():
                check_finite(work.groups)
        fits = self.plan is not None and self.plan.refresh(work)
        rest = self.plan.rest(work.groups) if fits and self.plan else work.groups
        if rest:
            for index, group in enumerate(work.groups):
                self._check(work, group, index)
        with whole_states(work.state):
            if not fits:
                self.plan = self._planned(work, capturing)
                if self.plan is not None:
                    check_fits(self.plan.refresh(work))
                    rest = self.plan.rest(work.groups)
            # A host sync on CUDA, as GradScaler itself has for optimizers it cannot fuse with.
            if rest and found_inf is not None and found_inf.item():
                rest = []
            ready = self._ready(work, rest, grad_scale, found_inf)
        if self.plan is not None:
            self.plan.run(grad_scale, found_inf, capturing)
        for step in ready:
            step()

    def _planned(self, work: Work, capturing: bool) -> OptimizerPlan | None:
        """The Triton path's plan, or None if nothing takes it."""
        taken = [eligible(work.backend, group, i) for i, group in enumerate(work.groups)]
        if not any(taken):
            return None
        _refuse_capture(capturing, "step()")
        launcher = partial(launches().StepLauncher, skipped=self._skipping(work))
        # Memory that is made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            return OptimizerPlan(work, taken, launcher, self.plan, self.captured)

    def _ready(
        self,
        work: Work,
        groups: list[dict[str, Any]],
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Callable[[], None]]:
        """What steps these groups on the torch path, all of it checked before any of it runs."""
        scale = None if scale is None else scale.reshape(())
        check = partial(self._check_shapes, work)
        ready: list[Callable[[], None]] = []
        for index, (group, batches) in enumerate(_created(work, groups)):
            if not group["clipping"]:
                first = next(batches)
                if first[0].misshapen:
                    check(first[0].params, group)
                args = work.rule, chain([first], batches), group, scale, found_inf
                ready.append(partial(torch_path.step_unclipped, *args))
                continue
            clip = Clip.of(group, self._skipping(work))
            for at, (lists, options) in enumerate(batches):
                if not lists.params:
                    self.blocks.drop((index, at))
                    continue
                plan = self.blocks.get((index, at), lists, options, clip, check)
                ready.append(torch_path.ready(work.rule, plan, lists, options, clip, scale))
        return ready

    def _skipping(self, work: Work) -> SkippedUnits | None:
        """Where skipped units are counted, if they are skipped."""
        return self.skipped if work.nonfinite == "skip_unit" else None

    def _check(self, work: Work, group: dict[str, Any], index: int) -> None:
        group = limited(group, work.nonfinite)
        if self.checked.holds(group, index):
            check_options(group, f" in parameter group {index}")
            return
        check_group(group, index)
        if not group["clipping"]:
            return
        for i, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{work.name} does not support sparse gradients, as of"
                    f" {tensor_name(group, index, i)}; wrap an optimizer that does"
                    " (agc_triton.AGC(torch.optim.SparseAdam(...))), or set clipping=0"
                    f"{' without skip_unit' if work.nonfinite == 'skip_unit' else ''}"
                )
            check_grad(param, grad, group, index, i)
        self._check_shapes(work, [p for p in group["params"] if p.grad is not None], group)
        self.checked.add(group, index)

    def _check_shapes(self, work: Work, params: list[Tensor], group: Mapping[str, Any]) -> None:
        keys = work.rule.kernel.states(group)
        check_shapes(params, keys, work.state, work.groups)


def _created(work: Work, groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Batches]]:
    """The groups' batches; all states of all groups are created before any is updated."""
    bounded = [limited(group, work.nonfinite) for group in groups]
    batches = list(map(work.collect, bounded))
    # A group's states are there with its first batch.
    return [(group, chain([next(b)], b)) for group, b in zip(bounded, batches, strict=True)]


class Clipper:
    """Clips the gradients of parameter groups in place, with a plan that is kept between calls."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._taken: list[set[int]] = []
        self._plan: ClipPlan | None = None
        self.captured: list[Any] = []  # as of FusedStep

    def clip_(self, groups: Sequence[Mapping[str, Any]], backend: str) -> list[list[Tensor]]:
        """Clip on both paths; returns, per group, the parameters whose gradient is sparse.

        Raises:
            RuntimeError: ``backend="triton"`` and a parameter that the kernels cannot take.
        """
        of_groups = (
            (*map(id, group["params"]), group["unit_dim"], bool(group["clipping"]))
            for group in groups
        )
        key = (backend, *of_groups)
        capturing = is_capturing()
        if self._plan is None or key != self._key or not self._plan.refresh(groups):
            self._key, self._plan = key, None
            taken = [
                eligible(backend, group, index) if group["clipping"] else []
                for index, group in enumerate(groups)
            ]
            self._taken = [{id(p) for p in params} for params in taken]
            if any(taken):
                _refuse_capture(capturing, "clipping")
                with torch.inference_mode(False):
                    self._plan = ClipPlan(groups, taken, launches().StepLauncher, self.captured)
                check_fits(self._plan.refresh(groups))
        if self._plan is not None:
            self._plan.run(capturing)
        sparse = []
        for group, ids in zip(groups, self._taken, strict=True):
            rest = [p for p in group["params"] if id(p) not in ids and p.grad is not None]
            sparse.append([p for p in rest if p.grad.layout is not torch.strided])
            if group["clipping"]:
                dense = [p for p in rest if p.grad.layout is torch.strided]
                torch_path.clip_grads_(dense, Clip.of(group))
        return sparse


def buckets_of(
    members: Sequence[tuple[Tensor, int | None, int]], states: int
) -> tuple[Bucket, ...]:
    """The launches over parameters of one dtype, each with its unit_dim and its group's index."""
    tensors = [
        TensorUnits(kernel_layout(p, unit_dim), p.data_ptr() % ALIGNMENT == 0, group)
        for p, unit_dim, group in members
    ]
    return plan_buckets(tensors, members[0][0].dtype.to_real().itemsize, states).buckets


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _refuse_capture(capturing: bool, what: str) -> None:
    """Plans need memory and copies that a capture allows none of."""
    if capturing:
        raise RuntimeError(
            f"a CUDA graph cannot capture {what} without a plan for these parameters, options and"
            f" layouts of gradients; run {what} once on them before the capture"
        )


def check_fits(fits: bool) -> None:
    """Refuse to launch with tables that do not hold what is there now."""
    if not fits:
        raise AssertionError("a new plan does not fit what it was made from; please report this")
