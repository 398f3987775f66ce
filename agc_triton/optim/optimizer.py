"""What all AGC optimizers share: options, checks, state_dict compatibility and the one step()."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from agc_triton import dispatch
from agc_triton.nonfinite import SkippedUnits, check_finite, check_nonfinite
from agc_triton.optim.documentation import AGC_DOC
from agc_triton.rule import Batches, Clip, Rule
from agc_triton.torch_path import step as reference
from agc_triton.torch_path.plan import BlockPlans
from agc_triton.triton_path.plan import OptimizerPlan
from agc_triton.validation import (
    AGC_OPTIONS,
    CheckedGroups,
    check_grad,
    check_group,
    check_loaded,
    check_options,
    check_shapes,
    tensor_name,
)

if TYPE_CHECKING:
    from pandas import DataFrame

CLIPPING = 1e-2
AGC_EPS = 1e-3


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


class AGCOptimizer(Optimizer):
    """Adaptive gradient clipping in front of a torch.optim class; listed before it in the bases.

    A subclass names its `rule` and says in `_batches` how torch collects what it updates.
    """

    rule: ClassVar[Rule]
    # Objects pickled before there was such an option have none of their own.
    nonfinite: str = "propagate"
    _plan: OptimizerPlan | None = None

    def __init_subclass__(cls) -> None:
        """Show torch's arguments and ours in help() and inspect.signature()."""
        super().__init_subclass__()
        if "rule" not in vars(cls):  # a user's subclass speaks for itself
            return
        ours = inspect.signature(AGCOptimizer.__init__).parameters.values()
        _, *theirs = inspect.signature(super().__init__).parameters.values()
        merged = [*theirs, *(p for p in ours if p.kind is p.KEYWORD_ONLY)]
        cls.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]  # inspect's own
        cls.__doc__ = f"{cls.__doc__}\n{AGC_DOC}"

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        clipping: float | None = CLIPPING,
        agc_eps: float = AGC_EPS,
        unit_dim: int | None = None,
        backend: str = "auto",
        nonfinite: str = "propagate",
        **kwargs: Any,
    ) -> None:
        dispatch.check_backend(backend)
        check_nonfinite(nonfinite)
        self.backend, self.nonfinite, self._skipped = backend, nonfinite, SkippedUnits()
        self._block_plans, self._checked = BlockPlans(), CheckedGroups()
        self._captured: list[Any] = []  # as of FusedStep
        self._agc_defaults = {"clipping": clipping, "agc_eps": agc_eps, "unit_dim": unit_dim}
        torch_init: Any = super().__init__
        torch_init(params, *args, **kwargs)
        if dispatch.may_use_triton(backend, [p for g in self.param_groups for p in g["params"]]):
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it may set ``clipping``, ``agc_eps`` and ``unit_dim``.

        Raises:
            ValueError, TypeError: as the constructor; the optimizer is then unchanged.
        """
        # torch.optim builds ``defaults`` itself and calls this from its constructor.
        for key, value in self._agc_defaults.items():
            self.defaults.setdefault(key, value)
        super().add_param_group(param_group)
        try:
            group, index = self.param_groups[-1], len(self.param_groups) - 1
            check_group(self._clipped(group), index)
            dispatch.check_group_backend(self.backend, group, index)
        except BaseException:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: torch's three entries and ours; counts start again."""
        ours = {key: getattr(self, key) for key in ("backend", "nonfinite", "_agc_defaults")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; groups saved by torch.optim keep this optimizer's AGC options.

        Raises:
            ValueError: a checkpoint that this optimizer cannot go on from; nothing is loaded then.
        """
        kept = dict(self.__dict__)
        before = kept.get("param_groups", [])
        try:
            super().__setstate__(state)
            self._block_plans = BlockPlans()  # old ones keep the memory of the states replaced
            self.__dict__.setdefault("_skipped", SkippedUnits())
            self.__dict__.setdefault("_checked", CheckedGroups())
            self.__dict__.setdefault("_captured", [])
            self._fill_groups(before)
            if kept:
                for index, group in enumerate(self.param_groups):
                    check_loaded(self.rule.kernel, self.state, group, index)
            if self._plan is not None:
                self._plan.release()
        except (KeyError, ValueError) as error:
            self.__dict__.update(kept)
            if isinstance(error, KeyError):
                raise ValueError(
                    f"the checkpoint has no {error}; it may be of another optimizer"
                ) from None
            raise

    def _fill_groups(self, before: list[dict[str, Any]]) -> None:
        for index, group in enumerate(self.param_groups):
            options = before[index] if index < len(before) else self.defaults
            for key in AGC_OPTIONS:
                group.setdefault(key, options[key])

    # Plans are found by address, which a traced step has none of.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # not in torch's stubs
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it per closure type
        """Clip and update once.

        Args:
            closure: reevaluates the model and returns the loss; called once.

        Raises:
            RuntimeError: a sparse gradient, one whose dtype, device or shape is not its
                parameter's, with ``nonfinite="raise"`` one that is not finite, or with
                ``backend="triton"`` a parameter that the kernels cannot take.
            TypeError, ValueError: an option of a group that was changed to what is not one.

        Nothing has been changed after any of these.
        """
        if "capturable" in self.defaults:
            self._graph_capture_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step_groups()
        return loss

    @property
    def skipped_units(self) -> int:
        """Units left alone since this object was made; reading it waits for the device.

        Always 0 but with ``nonfinite="skip_unit"``. A step that GradScaler skips counts none.
        """
        return self._skipped.total()

    def explain(self, bandwidth: float = 3.0e12) -> DataFrame:
        """What a step does: a row per launch, or per reason why torch does it, and a total.

        ``class`` is "begin" for the launch that prepares a step, "rows" for programs of several
        units, "registers" for one unit each, "split" for parts of longer ones. Parameters count
        with or without a gradient.

        Args:
            bandwidth: bytes per second of the device's memory, for the floor in ms; the default is
                about what a copy reaches on an H100.

        Returns:
            columns backend, why, device, dtype, class, tensors, units, elements, tile (rows x
            columns x chunks), num_warps, bytes, launches (of this package's kernels), floor_ms.
        """
        from agc_triton.explain import explain  # pandas takes longer to import than all of this

        return explain(self, bandwidth)

    def _step_groups(self) -> None:
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        capturing = dispatch.is_capturing()
        if self.nonfinite == "raise":
            if capturing:
                raise RuntimeError(
                    "nonfinite='raise' waits for the device, which a CUDA graph cannot capture; use"
                    " nonfinite='skip_unit'"
                )
            # GradScaler's overflows are a matter of course, and skip the step anyway.
            if found_inf is None or not found_inf.item():
                check_finite(self.param_groups)
        fits = self._plan is not None and self._plan.refresh(self)
        rest = self._plan.rest(self.param_groups) if fits and self._plan else self.param_groups
        if rest:
            for index, group in enumerate(self.param_groups):
                self._check_step(group, index)
        with whole_states(self.state):
            if not fits:
                self._plan = dispatch.plan(self, self._plan, capturing)
                if self._plan is not None:
                    dispatch.check_fits(self._plan.refresh(self))
                    rest = self._plan.rest(self.param_groups)
            # A host sync on CUDA, as GradScaler itself has for optimizers it cannot fuse with.
            if rest and found_inf is not None and found_inf.item():
                rest = []
            ready = self._ready(rest, scale, found_inf)
        if self._plan is not None:
            self._plan.run(scale, found_inf, capturing)
        for step in ready:
            step()

    def _ready(
        self, groups: list[dict[str, Any]], scale: Tensor | None, found_inf: Tensor | None
    ) -> list[Callable[[], None]]:
        """What steps these groups on the torch path, all of it checked before any of it runs."""
        scale = None if scale is None else scale.reshape(())
        ready: list[Callable[[], None]] = []
        for index, (group, batches) in enumerate(self._created(groups)):
            if not group["clipping"]:
                first = next(batches)
                if first[0].misshapen:
                    self._check_shapes(first[0].params, group)
                args = self.rule, chain([first], batches), group, scale, found_inf
                ready.append(partial(reference.step_unclipped, *args))
                continue
            clip = Clip.of(group, self._skipping())
            for at, (lists, options) in enumerate(batches):
                if not lists.params:
                    self._block_plans.drop((index, at))
                    continue
                plan = self._block_plans.get((index, at), lists, options, clip, self._check_shapes)
                ready.append(reference.ready(self.rule, plan, lists, options, clip, scale))
        return ready

    def _batches(self, group: dict[str, Any]) -> Batches:
        """What has a gradient, with its state (created by torch's `_init_group`) and options."""
        raise NotImplementedError

    def _created(self, groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Batches]]:
        """The groups' `_batches`; all states of all groups are created before any is updated."""
        clipped = list(map(self._clipped, groups))
        batches = list(map(self._batches, clipped))
        # A group's states are there with its first batch.
        return [(group, chain([next(b)], b)) for group, b in zip(clipped, batches, strict=True)]

    def _skipping(self) -> SkippedUnits | None:
        """Where skipped units are counted, if they are skipped."""
        return self._skipped if self.nonfinite == "skip_unit" else None

    def _clipped(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group; without clipping an infinite limit where units are needed all the same."""
        if group["clipping"] or self._skipping() is None:
            return group
        return {**group, "clipping": math.inf}

    def _check_step(self, group: dict[str, Any], index: int) -> None:
        group = self._clipped(group)
        if self._checked.holds(group, index):
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
                    f"{type(self).__name__} does not support sparse gradients, as of"
                    f" {tensor_name(group, index, i)}; wrap an optimizer that does"
                    " (agc_triton.AGC(torch.optim.SparseAdam(...))), or set clipping=0"
                    f"{'' if self._skipping() is None else ' without skip_unit'}"
                )
            check_grad(param, grad, group, index, i)
        self._check_shapes([p for p in group["params"] if p.grad is not None], group)
        self._checked.add(group, index)

    def _check_shapes(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        keys = self.rule.kernel.states(group)
        check_shapes(params, keys, self.state, self.param_groups)

    def _graph_capture_check(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        if check is None:  # torch < 2.10
            check = self._cuda_graph_capture_health_check
        check()
