"""The one door to both paths: what is asked of them, kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agc_triton.exchange import CachedSharding, Sharding
from agc_triton.nonfinite import agreed, check_finite
from agc_triton.options import check_levels
from agc_triton.records import Recording
from agc_triton.routing import eligible, wants_triton
from agc_triton.rule import KernelRule, Rule, Work
from agc_triton.snapshot import Cached
from agc_triton.torch_path.clip import track_grads
from agc_triton.torch_path.prepare import Beats, Given, TorchPath
from agc_triton.tracking import Recorder
from agc_triton.validation import bring_gradients, check_work

if TYPE_CHECKING:
    from agc_triton.triton_path.buckets import Bucket as Bucket
    from agc_triton.triton_path.plan import Preview as Preview
    from agc_triton.triton_path.plan import TritonPlan


class Paths:
    """What an optimizer keeps from step to step on both paths; it is never pickled."""

    def __init__(self) -> None:
        self.triton, self.torch = TritonPath(), TorchPath()
        self._sharding = CachedSharding()
        self.recorder = Recorder()

    def release(self) -> None:
        """Let go of states that have been replaced."""
        self.torch.release()
        self.triton.release()

    def step(self, work: Work, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Check and plan everything on both paths, then update.

        Raises:
            RuntimeError, TypeError, ValueError: as `AGCOptimizer.step`; nothing has been changed.
        """
        capturing = is_capturing()
        check_levels(work.groups, work.own)
        sharding = self._sharding.of(work)
        if sharding.kinds:
            bring_gradients(work.groups)
            found_inf = agreed(found_inf, sharding.ranks)
        if work.nonfinite == "raise":
            _check_finite(work, found_inf, capturing)
        recording = self.recorder.next(work.nonfinite == "skip_unit", capturing)
        with _whole_states(work.state):
            check = partial(check_work, work)
            plan = self.triton.prepare(work, check, recording, sharding, capturing, "step()")
            rest = list(enumerate(work.groups)) if plan is None else plan.rest(work.groups)
            given = Given(recording, sharding, grad_scale, found_inf)
            beats = self.torch.prepare(work, rest, given)
        _run(beats, plan, given, capturing)
        self.recorder.step_made(recording, work.groups, capturing)


def _run(
    beats: Beats,
    plan: TritonPlan | None,
    given: Given,
    capturing: bool,
) -> None:
    """Both paths; what is whole on this rank is updated while sums go over ranks."""
    exchange = given.sharding.exchange
    # Torch's sums first, as ranks may fail each other before anything has been written.
    beats.begin()
    if plan is not None:
        plan.begin(given.grad_scale, given.found_inf, given.recording.number, capturing)
    if exchange is not None:
        exchange.start()
    if plan is not None:
        plan.update()
    beats.update()
    if exchange is not None:
        exchange.wait()
    if plan is not None:
        plan.finish()
    beats.finish()


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
        recording: Recording,
        sharding: Sharding,
        capturing: bool,
        what: str,
    ) -> TritonPlan | None:
        """The plan, ready to run, or None if nothing takes this path.

        Raises:
            RuntimeError: ``backend="triton"`` and a parameter that the kernels cannot take, or
                there is no plan and a CUDA graph is being captured (``what`` is to be).
            RuntimeError, TypeError, ValueError: what ``check`` raises before a plan is made.
        """

        exchange, records = sharding.exchange, recording.of_plans

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
            return TritonPlan(work, taken, self._own, recording, exchange, self.captured)

        return self._cached.get(
            lambda plan: plan.look(work, exchange, records),
            make,
            lambda plan: plan.write_tables(work),
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
        self._triton, self._torch = TritonPath(), TorchPath()
        self._sharding = CachedSharding()
        self._no_state: dict[Tensor, dict[str, Any]] = {}
        self.recorder = Recorder()

    @property
    def captured(self) -> list[Any]:
        """What the replays of captured graphs read."""
        return self._triton.captured

    def clip_(
        self,
        groups: Sequence[dict[str, Any]],
        others: Sequence[Mapping[str, Any]],
        backend: str,
        tracked: bool | None,
    ) -> Recording:
        """Clip dense gradients on both paths; they have been checked.

        Args:
            groups: what is clipped.
            others: what is not, and tracked in a step that is.
            backend: as an optimizer's.
            tracked: whether this one is; None to go by the recorder.

        Raises:
            RuntimeError: ``backend="triton"`` and a parameter that the kernels cannot take.
        """
        capturing = is_capturing()
        work = Work("", CLIP, groups, self._no_state, lambda group: [], backend, "propagate")
        sharding = self._sharding.of(work)
        recording = self.recorder.next(False, capturing, tracked)
        given = Given(recording, sharding, None, None)
        plan = self._triton.prepare(work, lambda: None, recording, sharding, capturing, "clipping")
        rest = list(enumerate(groups)) if plan is None else plan.rest(groups)
        beats = self._torch.prepare_clipping(work, rest, given)
        if recording.number is not None:
            beats.meanwhile += [partial(track_grads, group, recording) for group in others]
        _run(beats, plan, given, capturing)
        self.recorder.step_made(recording, [*groups, *others], capturing)
        return recording


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


def _check_finite(work: Work, found_inf: Tensor | None, capturing: bool) -> None:
    if capturing:
        raise RuntimeError(
            "nonfinite='raise' waits for the device, which a CUDA graph cannot capture; use"
            " nonfinite='skip_unit'"
        )
    # GradScaler's overflows are a matter of course, and skip the step anyway.
    if found_inf is None or not found_inf.item():
        check_finite(
            work.groups,
            "nothing has been updated: leave this batch out, lower the learning rate, or use"
            " nonfinite='skip_unit'",
        )


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
