"""AGC around any torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from agc_triton.clipping import clip_groups_
from agc_triton.dispatch import Clipper
from agc_triton.optim.groups import check_keys, name_unnamed
from agc_triton.optim.optimizer import AGC_EPS, CLIPPING, AGCOptimizer
from agc_triton.options import AGC_OPTIONS
from agc_triton.units import UnitDim
from agc_triton.validation import check_group


class AGC(Optimizer):
    """Clips ``.grad`` unit by unit, in place, before every update of another optimizer.

    ``param_groups``, ``state``, ``defaults``, hooks and checkpoints are the base's own, so
    schedulers, GradScaler and `state_dict` work on either. The settings below are written into the
    base's groups where a group does not have its own. Row-sparse gradients of rank-2 parameters are
    clipped by row where the base takes sparse gradients.

    Args:
        optimizer: any optimizer but one that already clips (an AGC class).
        clipping, agc_eps, unit_dim: as in `agc_triton.AdamW_AGC`.

    Raises:
        TypeError: ``optimizer`` is not an Optimizer, already clips, or lacks what all others have.
        ValueError: an option out of range.
    """

    # GradScaler unscales by itself: the base must not see scaled gradients after they were clipped.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        clipping: float | None = CLIPPING,
        agc_eps: float = AGC_EPS,
        unit_dim: UnitDim = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"AGC wraps a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if isinstance(optimizer, (AGC, AGCOptimizer)):
            raise TypeError(f"{type(optimizer).__name__} already clips; use it as it is")
        for name in ("param_groups", "defaults"):
            if not hasattr(optimizer, name):
                raise TypeError(
                    f"{type(optimizer).__name__} has no {name}, which AGC writes its settings to;"
                    " wrap the inner optimizer instead"
                )
        options = {"clipping": clipping, "agc_eps": agc_eps, "unit_dim": unit_dim}
        for index, group in enumerate(optimizer.param_groups):
            check_keys(group, index, optimizer.defaults)
            _check_group({**options, **group}, index)
        self.optimizer = optimizer
        self._clipper = Clipper()
        self._known: list[dict[str, Any]] = []
        optimizer.defaults.update(options)
        self._fill_groups()

    # Plans are found by address, which a traced step has none of.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # not in torch's stubs
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it per closure type
        """Clip, then step the base; with a closure, clip after each of the base's evaluations.

        Raises:
            RuntimeError: a gradient that cannot be clipped; nothing has been changed then.
        """
        if closure is not None:

            def clipped_closure() -> float:
                loss = closure()
                self._clip()
                return loss

            return self.optimizer.step(clipped_closure)
        # Nothing calls the hooks of an optimizer that does without torch's constructor, as some do
        # that wrap another.
        if not getattr(type(self.optimizer).step, "hooked", False):
            self._clip()
            return self.optimizer.step()
        # Last of the pre-hooks, so that what the others do to gradients is clipped as well.
        handle = self.optimizer.register_step_pre_hook(lambda *_: self._clip())
        try:
            return self.optimizer.step()
        finally:
            handle.remove()

    @torch.no_grad()
    def _clip(self) -> None:
        self._fill_groups()
        for index, group in enumerate(self.param_groups):
            _check_group(group, index)
        clip_groups_(self.param_groups, "auto", self._clipper)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; bare parameters are given names where its groups have names.

        Raises:
            ValueError, TypeError: as the constructor; the base is then unchanged.
        """
        check_keys(param_group, len(self.param_groups), self.defaults)
        name_unnamed(param_group, self.param_groups)
        self.optimizer.add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1], len(self.param_groups) - 1)
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
        """Load into the base; groups saved without AGC options keep the present ones."""
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
        self.optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        """Everything else, hooks among it, is the base's."""
        if name == "optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """The base optimizer holds everything."""
        return {"optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the base optimizer."""
        self.__dict__.update(state)
        self._clipper = Clipper()
        self._known = []
        self._fill_groups()

    def __repr__(self) -> str:
        return f"AGC({self.optimizer!r})"


def _check_group(group: dict[str, Any], index: int) -> None:
    check_group(group, index, units=bool(group["clipping"]))
