"""A float64 oracle of AGC in front of the rules in tests/support/formulas.py."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.formulas import RULES, SCALARS, Options, State, defaults, first_state
from tests.support.rounded import SPACING, Rounded, as_float64, exact
from tests.support.tolerances import Tolerance


def norm(x: Rounded, axes: tuple[int, ...]) -> Rounded:
    """sqrt(sum(x ** 2)); n squares take n - 1 rounded additions, in whatever order."""
    total = np.sum(np.square(x.value), axis=axes, keepdims=True)
    roundings = x.value.size // max(total.size, 1)
    root = Rounded(total, roundings * SPACING[x.dtype] / 2 * total, x.dtype).sqrt()
    error = np.square(np.broadcast_to(x.error, x.value.shape))
    error = root.error + np.sqrt(np.sum(error, axis=axes, keepdims=True))
    return Rounded(root.value, error, x.dtype)


def clip(p: Rounded, g: Rounded, shape: torch.Size, o: Options, stored: torch.dtype) -> Rounded:
    """limit = clipping * max(||p||, agc_eps); g * limit / max(||g||, 1e-6) where ||g|| > limit.

    All of a tensor of squeezed rank <= 1 is one unit, else each index of ``unit_dim``. ``p``, in
    what norms are computed in, may carry an error; ``g`` is exact, in the gradient's dtype.
    """
    unclipped, g = g.to(stored), g.to(p.dtype)
    one_unit = sum(size != 1 for size in shape) <= 1
    unit_dim = None if one_unit else (o["unit_dim"] or 0) % len(shape)
    axes = tuple(axis for axis in range(np.ndim(p.value)) if axis != unit_dim)
    limit = norm(p, axes).maximum(o["agc_eps"]) * o["clipping"]
    g_norm = norm(g, axes)
    scaled = (g * (limit / g_norm.maximum(1e-6))).to(stored)
    value = np.where(g_norm.value > limit.value, scaled.value, unclipped.value)
    # So near to the limit that roundings decide, both branches give nearly the same.
    under = g_norm.value + g_norm.error < limit.value - limit.error
    return Rounded(value, np.where(under, unclipped.error, scaled.error), stored)


AGC: Options = {"clipping": 1e-2, "agc_eps": 1e-3, "unit_dim": None}


class Oracle:
    """One parameter group of ``torch.optim``'s ``name`` behind AGC; keeps its own state.

    ``params`` and ``states`` hold what each should be after the last `step`, as `Rounded`.
    """

    def __init__(
        self, name: str, params: Sequence[Tensor], tolerance: Tolerance, **options: Any
    ) -> None:
        self.rule, of_rule = RULES[name], defaults(name)
        assert options.keys() <= {*of_rule, *AGC}
        self.options = {**of_rule, **AGC, **options, "scalars": tolerance.scalars}
        if isinstance(options.get("lr"), Tensor) and tolerance.stored.itemsize == 2:
            self.options["scalars"] = torch.float32  # which the tensor has
        self.options["lr"] = float(self.options["lr"])
        self.options["betas"] = tuple(map(float, self.options.get("betas", ())))
        self.tolerance = tolerance
        self.shapes = [p.shape for p in params]
        self.load(params, [first_state(name, p, self.options) for p in params])

    def load(self, params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from an implementation's own values: errors start from nothing again."""
        dtype = self.tolerance.stored
        self.params = [exact(as_float64(p), dtype) for p in params]
        self.states: list[State] = [
            {
                key: exact(as_float64(value), torch.float32 if key in SCALARS else dtype)
                for key, value in state.items()
            }
            for state in states
        ]

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Clip and update the parameters that have a gradient."""
        for i, grad in enumerate(grads):
            if grad is not None:
                self._step(i, exact(as_float64(grad), grad.dtype.to_real()))

    def _step(self, i: int, g: Rounded) -> None:
        where, p = self.tolerance, self.params[i]
        if self.options["clipping"]:
            g = clip(p.to(where.norms), g, self.shapes[i], self.options, where.stored)
        g = g.to(where.stored)
        g = -g if self.options["maximize"] else g
        before = _in(where.rule, self.states[i])
        p, state = self.rule(p.to(where.rule), g.to(where.rule), before, self.options)
        self.params[i] = p.to(where.stored)
        self.states[i] = _in(where.stored, state)

    def trajectory(self, grads: Iterable[Sequence[Tensor | None]]) -> list[Oracle]:
        """Copies of itself after each of several steps."""
        after = []
        for given in grads:
            self.step(given)
            after.append(copy.copy(self))
            self.params, self.states = list(self.params), list(self.states)
        return after

    def check(self, params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Assert that an implementation has these parameters and exactly these states."""
        margin = self.tolerance.margin
        for i, (param, state) in enumerate(zip(params, states, strict=True)):
            assert state.keys() == self.states[i].keys()
            assert_within(param, self.params[i], margin, f"parameter {i}")
            for key, value in state.items():
                assert_within(value, self.states[i][key], margin, f"{key} of parameter {i}")


def _in(dtype: torch.dtype, state: State) -> State:
    """A state in another dtype, but for its scalars."""
    return {key: x if key in SCALARS else x.to(dtype) for key, x in state.items()}


def assert_within(actual: Tensor, expected: Rounded, margin: float, what: str) -> None:
    """Assert that a tensor is within ``margin`` times the error bound."""
    value = as_float64(actual)
    off = np.abs(value - expected.value)
    right = off <= margin * expected.error
    if right.all():
        return
    bound = np.broadcast_to(margin * expected.error, off.shape)
    wrong = [tuple(map(int, index)) for index in np.argwhere(~right)]
    raise AssertionError(
        f"{what}: {len(wrong)} of {off.size} are wrong, first {value[wrong[0]]} for"
        f" {expected.value[wrong[0]]} +- {bound[wrong[0]]} at {wrong[0]}"
    )
