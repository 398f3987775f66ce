"""AGC around any torch.optim.Optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer

from agc_triton.clipping import clip_groups_
from agc_triton.dispatch import Clipper
from agc_triton.nonfinite import check_finite, check_nonfinite
from agc_triton.optim.attributes import CheckedOption
from agc_triton.optim.bases import (
    check_base,
    check_closure,
    check_layouts,
    check_steppable,
    steps_as_torch,
)
from agc_triton.optim.by_position import by_name
from agc_triton.optim.groups import check_keys, name_unnamed
from agc_triton.optim.optimizer import AGC_EPS, CLIPPING, AGCOptimizer, Loss
from agc_triton.optim.tracking import ClipTracking
from agc_triton.options import AGC_OPTIONS, check_levels
from agc_triton.routing import check_backend
from agc_triton.tracking import Recorder
from agc_triton.units import UnitDim
from agc_triton.validation import check_group

# What to do about a gradient that is not finite; of no use here is what knows units.
_REMEDY = "nothing has been updated: leave this batch out or lower the learning rate"
_MOVED = (
    "the base may have moved the weights since the first evaluation of this step: go on from a"
    " checkpoint with a lower learning rate"
)


def _check_nonfinite(_: Any, nonfinite: str) -> None:
    check_nonfinite(nonfinite)
    if nonfinite == "skip_unit":
        raise ValueError(
            "Invalid nonfinite for AGC: 'skip_unit', as the update is another optimizer's and knows"
            " no units; use 'raise', or a class of agc_triton (SGD_AGC, AdamW_AGC, ...)"
        )


class AGC(ClipTracking, Optimizer):
    """Clips ``.grad`` unit by unit, in place, before every update of another optimizer.

    Limits, shapes and dtypes are those of `agc_triton.adaptive_clip_grad_` (Brock et al. 2021,
    arXiv 2102.06171, equation 3).
    ``param_groups``, ``state``, ``defaults``, hooks and checkpoints are the base's own, so
    schedulers, GradScaler and `state_dict` work on either. The settings below are written into the
    base's groups where a group does not have its own. Row-sparse gradients of rank-2 parameters are
    clipped by row where the base takes sparse gradients.

    Args:
        optimizer: any optimizer but one that already clips (an AGC class).
        clipping, agc_eps, unit_dim, backend: as in `agc_triton.AdamW_AGC`. The first three may be
            given by position, as in agc_optims, with a DeprecationWarning.
        nonfinite: ``"propagate"`` or ``"raise"``, as there.
        track_clipping: as there.

    Raises:
        TypeError: ``optimizer`` is not an Optimizer, already clips, lacks what all others have, or
            updates in other methods than ``step``.
        ValueError: an option out of range.
    """

    backend = CheckedOption(lambda _, value: check_backend(value), "auto")
    nonfinite = CheckedOption(_check_nonfinite, "propagate")

    # GradScaler unscales by itself: the base must not see scaled gradients after they were clipped.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        *positional: Any,
        clipping: float | None = CLIPPING,
        agc_eps: float = AGC_EPS,
        unit_dim: UnitDim = None,
        backend: str = "auto",
        nonfinite: str = "propagate",
        track_clipping: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"AGC wraps a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if isinstance(optimizer, (AGC, AGCOptimizer)):
            raise TypeError(f"{type(optimizer).__name__} already clips; use it as it is")
        check_base(optimizer)
        options = {"clipping": clipping, "agc_eps": agc_eps, "unit_dim": unit_dim}
        if positional:
            options |= by_name(positional, options)
        self.backend, self.nonfinite = backend, nonfinite
        for index, group in enumerate(optimizer.param_groups):
            check_keys(group, index, self._own, optimizer.defaults)
            _check_group({**options, **group}, index)
        self.optimizer = optimizer
        self._clipper = Clipper()
        self.track_clipping(track_clipping)
        self._known: list[dict[str, Any]] = []
        optimizer.defaults.update(options)
        self._fill_groups()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    # Plans are found by address, which a traced step has none of.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # not in torch's stubs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, then step the base; with a closure, clip after each of the base's evaluations.

        Gradients are clipped against the weights at which they were evaluated.

        Raises:
            RuntimeError: a gradient that cannot be clipped or that the base, if it is torch's, does
                not take, or with ``nonfinite="raise"`` one that is not finite; nothing has been
                changed then, but where the base has evaluated before in the same step (LBFGS). Or
                the base has stepped without calling its hooks.
            TypeError: the base needs a closure.
        """
        if closure is not None:
            evaluations = itertools.count()

            def clipped_closure() -> Any:
                loss = closure()
                self._clip(next(evaluations))
                return loss

            # torch's own evaluate first; others may use what there is before they do.
            if not steps_as_torch(self.optimizer):
                self._clip(stale=True)
            return self.optimizer.step(clipped_closure)
        check_closure(self.optimizer)
        # Nothing calls the hooks of an optimizer that does without torch's constructor, as some do
        # that wrap another.
        if not getattr(type(self.optimizer).step, "hooked", False):
            self._clip()
            return self.optimizer.step()
        clipped: list[None] = []
        # Last of the pre-hooks, so that what the others do to gradients is clipped as well.
        handle = self.optimizer.register_step_pre_hook(lambda *_: clipped.append(self._clip()))
        try:
            loss = self.optimizer.step()
        finally:
            handle.remove()
        if not clipped:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has stepped without calling its step hooks, on"
                " gradients that were not clipped: its step() has been replaced; call"
                " agc_triton.adaptive_clip_grad_ before it instead of wrapping it"
            )
        return loss

    @torch.no_grad()
    def _clip(self, evaluation: int = 0, stale: bool = False) -> None:
        """Clip in place; ``stale`` gradients, of the last evaluation maybe, need not be finite."""
        self._fill_groups()
        check_levels(self.param_groups, self._own, self.defaults)
        for index, group in enumerate(self.param_groups):
            _check_group(group, index)
        check_layouts(self.optimizer)
        if self.nonfinite == "raise" and not stale:
            check_finite(self.param_groups, _REMEDY if evaluation == 0 else _MOVED)
        clip_groups_(self.param_groups, self.backend, self._clipper)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; bare parameters are given names where its groups have names.

        Raises:
            ValueError, TypeError: as the constructor; the base is then unchanged.
        """
        check_keys(param_group, len(self.param_groups), self._own, self.defaults)
        name_unnamed(param_group, self.param_groups)
        self.optimizer.add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            check_steppable(self.optimizer, self.param_groups[-1], index)
            _check_group(self.param_groups[-1], index)
        except BaseException:
            self.param_groups.pop()
            raise

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """The base's zero_grad."""
        self.optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, with the AGC options in its groups."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the base; groups saved without AGC options keep the present ones.

        Raises:
            ValueError: a group sets what is the whole optimizer's; nothing is loaded then.
        """
        check_levels(state_dict.get("param_groups", ()), self._own, self.defaults)
        self._fill_groups()
        self.optimizer.load_state_dict(state_dict)
        self._fill_groups()

    def _fill_groups(self) -> None:
        """Give groups that come without AGC options, from a checkpoint say, those they had."""
        for index, group in enumerate(self.param_groups):
            known = self._known[index] if index < len(self._known) else self.defaults
            for key in AGC_OPTIONS:
                group.setdefault(key, known[key])
        self._known = [{key: group[key] for key in AGC_OPTIONS} for group in self.param_groups]

    @property
    def _recorder(self) -> Recorder:
        return self._clipper.recorder

    @property
    def _own(self) -> dict[str, str]:
        return {"backend": self.backend, "nonfinite": self.nonfinite}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        for key in AGC_OPTIONS:
            value.setdefault(key, self.defaults[key])
        self.optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        """Everything else, hooks among it, is the base's."""
        if name == "optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """The base optimizer holds nearly everything."""
        tracking = self._recorder.every, self._recorder.warn
        ours = {"backend": self.backend, "nonfinite": self.nonfinite, "_tracking": tracking}
        return {"optimizer": self.optimizer, **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a base optimizer; or give the one there is a state, groups or defaults."""
        if "optimizer" in state:
            self.__dict__.update(state)
            self._clipper = Clipper()
            self._recorder.track(*self.__dict__.pop("_tracking", (0, True)))
            self._known = []
        else:
            self._fill_groups()
            options = {key: self.defaults[key] for key in AGC_OPTIONS}
            self.optimizer.__setstate__(state)
            self.optimizer.defaults = {**options, **self.optimizer.defaults}
        self._fill_groups()

    def __repr__(self) -> str:
        return f"AGC({self.optimizer!r})"


def _check_group(group: dict[str, Any], index: int) -> None:
    check_group(group, index, units=bool(group["clipping"]))
