"""What all AGC optimizers share: options, checks, state_dict compatibility and the one step()."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from agc_triton.dispatch import Paths
from agc_triton.explain import explain
from agc_triton.nonfinite import check_nonfinite
from agc_triton.optim.attributes import CheckedOption
from agc_triton.optim.documentation import documented, merged_signature
from agc_triton.optim.groups import check_keys, name_unnamed
from agc_triton.optim.loading import load_scalars
from agc_triton.optim.tracking import ClipTracking
from agc_triton.options import AGC_OPTIONS, check_levels
from agc_triton.routing import check_backend, check_group_backend, may_use_triton
from agc_triton.rule import Batches, Rule, Work
from agc_triton.tracking import Recorder
from agc_triton.units import UnitDim
from agc_triton.validation import check_group, check_loaded

if TYPE_CHECKING:
    from pandas import DataFrame

# What a closure returns: a number, or a tensor as in torch's examples.
Loss = TypeVar("Loss")

CLIPPING = 1e-2
AGC_EPS = 1e-3


@functools.cache
def _count_lists(init_group: Callable[..., Any]) -> int:
    """How many lists torch's `_init_group` fills, after the group."""
    return len(inspect.signature(init_group).parameters) - 2


def _check_backend(optimizer: Any, backend: str) -> None:
    check_backend(backend)
    for index, group in enumerate(vars(optimizer).get("param_groups", ())):
        check_group_backend(backend, group, index)


class AGCOptimizer(ClipTracking, Optimizer):
    """Adaptive gradient clipping in front of a torch.optim class; listed before it in the bases.

    A subclass names its ``rule``; where its base has no ``_init_group``, as most outside of torch,
    it says in ``_init_states`` how states are made (examples/lion.py).
    """

    rule: ClassVar[Rule]
    backend = CheckedOption(_check_backend, "auto")
    """``"auto"``, ``"triton"`` or ``"torch"``; may be set between steps, and is checked then."""
    nonfinite = CheckedOption(lambda _, value: check_nonfinite(value), "propagate")
    """``"propagate"``, ``"skip_unit"`` or ``"raise"``; may be set between steps as well."""
    _constructing = False

    takes_scaled_grads: bool = True
    """Set it to False and GradScaler unscales ``.grad`` before each step, whatever path that takes:
    for clipping by another package, which has to see what the gradients are."""

    def __init_subclass__(cls) -> None:
        """Show torch's arguments and ours in help() and inspect.signature()."""
        super().__init_subclass__()
        if "rule" not in vars(cls):  # a user's subclass speaks for itself
            return
        torchs = cls.torch_class()
        signature = merged_signature(torchs.__init__, AGCOptimizer.__init__)
        cls.__signature__ = signature  # type: ignore[attr-defined]  # inspect's own
        cls.__doc__ = documented(cls.__doc__, torchs.__doc__)

    @classmethod
    def torch_class(cls) -> Any:
        """The class that this one clips in front of."""
        return next(base for base in cls.__bases__ if not issubclass(base, AGCOptimizer))

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        clipping: float | None = CLIPPING,
        agc_eps: float = AGC_EPS,
        unit_dim: UnitDim = None,
        backend: str = "auto",
        nonfinite: str = "propagate",
        track_clipping: int = 0,
        **kwargs: Any,
    ) -> None:
        self.backend, self.nonfinite, self._paths = backend, nonfinite, Paths()
        self.track_clipping(track_clipping)
        self._agc_defaults = {"clipping": clipping, "agc_eps": agc_eps, "unit_dim": unit_dim}
        torch_init: Any = super().__init__
        self._constructing = True
        torch_init(params, *args, **kwargs)
        self._constructing = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it may set ``clipping``, ``agc_eps`` and ``unit_dim``.

        Bare parameters are given names where the groups before have names.

        Raises:
            ValueError, TypeError: as the constructor; the optimizer is then unchanged.
        """
        # torch.optim builds ``defaults`` itself and calls this from its constructor.
        for key, value in self._agc_defaults.items():
            self.defaults.setdefault(key, value)
        check_keys(param_group, len(self.param_groups), self._work().own, self.defaults)
        if not self._constructing:  # groups made together are named together
            name_unnamed(param_group, self.param_groups)
        super().add_param_group(param_group)
        try:
            group, index = self.param_groups[-1], len(self.param_groups) - 1
            check_group(group, index, units=self._work().needs_units(group))
            check_group_backend(self.backend, group, index)
        except BaseException:
            self.param_groups.pop()
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as torch's
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or torch's has saved.

        Raises:
            ValueError: a checkpoint that this optimizer cannot go on from; nothing is loaded then.
        """
        loaded: list[Any] = []
        # Last of the hooks, which may give another one.
        look = self.register_load_state_dict_pre_hook(lambda _, given: loaded.append(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            look.remove()
        load_scalars(self, loaded[-1], self.rule.kernel.scalars)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: torch's three entries and ours; counts start again."""
        keys = ("backend", "nonfinite", "takes_scaled_grads", "_agc_defaults")
        tracking = self._recorder.every, self._recorder.warn
        own = {key: getattr(self, key) for key in keys}
        return {**super().__getstate__(), **own, "_tracking": tracking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; groups saved by torch.optim keep this optimizer's AGC options.

        Raises:
            ValueError: a checkpoint that this optimizer cannot go on from; nothing is loaded then.
        """
        kept = dict(self.__dict__)
        before = kept.get("param_groups", [])
        try:
            self._take_over(state)
            self.__dict__.setdefault("_paths", Paths())
            if tracking := self.__dict__.pop("_tracking", None):
                self._recorder.track(*tracking)
            self.defaults = {**self._agc_defaults, **self.defaults}
            self._fill_groups(before)
            if kept:
                check_levels(self.param_groups, self._work().own)
                for index, group in enumerate(self.param_groups):
                    check_loaded(self.rule.kernel, self.state, group, index)
            self._paths.release()
        except BaseException:
            self.__dict__.update(kept)
            raise

    def _take_over(self, state: dict[str, Any]) -> None:
        """Let torch take over a state, of which it reads step counts."""
        try:
            super().__setstate__(state)
        except KeyError as error:
            raise ValueError(
                f"the checkpoint has no {error}; it may be of another optimizer"
            ) from None

    def _fill_groups(self, before: list[dict[str, Any]]) -> None:
        for index, group in enumerate(self.param_groups):
            options = {**self.defaults, **(before[index] if index < len(before) else {})}
            for key in AGC_OPTIONS:
                group.setdefault(key, options[key])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    # Plans are found by address, which a traced step has none of.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # not in torch's stubs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        # A forked process may not ask CUDA whether it captures, and cannot be.
        if "capturable" in self.defaults and not torch.cuda._is_in_bad_fork():
            self._graph_capture_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            self._paths.step(self._work(), scale, found_inf)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks: whether to leave unscaling to the step, as the kernels can."""
        return self.takes_scaled_grads and may_use_triton(self.backend, self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.takes_scaled_grads = value

    @property
    def skipped_units(self) -> int:
        """Units left alone since this object was made; reading it waits for the device.

        Always 0 but with ``nonfinite="skip_unit"``. A step that GradScaler skips counts none. Of
        sharded parameters each rank counts the units of which it holds a part.
        """
        return self._recorder.records.skipped()

    def explain(self, bandwidth: float = 3.0e12) -> DataFrame:
        """What a step does: a row per launch, or per reason why torch does it, and a total.

        ``class`` is "begin" for the launch that prepares a step, "rows" for programs of several
        units, "registers" for one unit each, "split" for parts of longer ones; "shared" where
        ranks share the units, whose sums an "all-reduce" adds up, and a "fold" before it where one
        rank's part is long. Parameters count with or without a gradient.

        Args:
            bandwidth: bytes per second of the device's memory, for the floor in ms; the default is
                about what a copy reaches on an H100.

        Returns:
            columns backend, why, device, dtype, class, tensors, units, elements, tile (rows x
            columns x chunks), num_warps, bytes, launches (of this package's kernels), floor_ms.

        Raises:
            ImportError: pandas is not installed; nothing else here needs it.
        """
        return explain(self._work(), bandwidth)

    @property
    def _recorder(self) -> Recorder:
        return self._paths.recorder

    def _work(self) -> Work:
        """What a step is made on."""
        return Work(
            name=type(self).__name__,
            rule=self.rule,
            groups=self.param_groups,
            state=self.state,
            collect=self._batches,
            backend=self.backend,
            nonfinite=self.nonfinite,
            tracking=self._recorder.every > 0,
        )

    def _batches(self, group: dict[str, Any]) -> Batches:
        """What has a gradient, with its state and options; states that are missing are created."""
        self._init_states(group)
        params = [p for p in group["params"] if p.grad is not None]
        return [(self.rule.lists(params, self.state, group), group)]

    def _init_states(self, group: dict[str, Any]) -> None:
        """Create the states of the group's parameters that have a gradient and no states yet.

        By torch's `_init_group`; a class whose base has none overrides this. ``self.state[param]``
        gets an entry per key of the rule's `KernelRule`: states in the parameter's dtype, shape and
        layout, scalars as fp32 tensors of one element on any device.
        """
        cls: Any = type(self)
        create = cls._init_group
        create(self, group, *([] for _ in range(_count_lists(create))))

    def _graph_capture_check(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        if check is None:  # torch < 2.10
            check = self._cuda_graph_capture_health_check
        check()
