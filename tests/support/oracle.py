"""A float64 oracle of AGC and of four torch.optim rules, written from their formulas.

Beside each value runs a bound on how far arithmetic with coarser roundings may be from it: an
operation passes its operands' errors on and adds the rounding of its own result (running error
analysis; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.3).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.support.tolerances import Tolerance

Array: TypeAlias = npt.NDArray[np.float64]
Options: TypeAlias = Mapping[str, Any]
State: TypeAlias = Mapping[str, "Rounded"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SPACING = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}  # of numbers from 1 to 2
LEAST_NORMAL = {dtype: torch.finfo(dtype).smallest_normal for dtype in DTYPES}


class Rounded:
    """A float64 array, and a bound on its error in an implementation that rounds to ``dtype``."""

    def __init__(self, value: Array, error: Array, dtype: torch.dtype) -> None:
        self.value, self.error, self.dtype = value, error, dtype

    def to(self, dtype: torch.dtype) -> Rounded:
        """In another dtype: rounded if that is coarser."""
        coarser = SPACING[dtype] > SPACING[self.dtype]
        return (rounded if coarser else Rounded)(self.value, self.error, dtype)

    def _operand(self, other: Rounded | float) -> Rounded:
        # Hyperparameters are rounded to the dtype of the operation that takes them.
        other = other if isinstance(other, Rounded) else exact(other, torch.float64)
        return other.to(self.dtype)

    def __add__(self, other: Rounded | float) -> Rounded:
        b = self._operand(other)
        return rounded(self.value + b.value, self.error + b.error, self.dtype)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.dtype)

    def __sub__(self, other: Rounded | float) -> Rounded:
        return self + -self._operand(other)

    def __mul__(self, other: Rounded | float) -> Rounded:
        b = self._operand(other)
        error = np.abs(self.value) * b.error + (np.abs(b.value) + b.error) * self.error
        return rounded(self.value * b.value, error, self.dtype)

    def __truediv__(self, other: Rounded | float) -> Rounded:
        b = self._operand(other)
        value = self.value / b.value
        # A divisor that may be 0 bounds nothing: 2**40 times itself stands for that.
        least = np.maximum(np.abs(b.value) - b.error, (np.abs(b.value) + b.error) * 2**-40)
        error = (self.error + np.abs(value) * b.error) / least
        return rounded(value, error, self.dtype)

    def __pow__(self, exponent: float) -> Rounded:
        error = exponent * self.value ** (exponent - 1) * self.error
        return rounded(self.value**exponent, error, self.dtype)

    def sqrt(self) -> Rounded:
        """Its operand's error e becomes at most e / sqrt(x), and never more than sqrt(e)."""
        least = np.maximum(self.value, np.maximum(self.error, np.finfo(np.float64).tiny))
        return rounded(np.sqrt(self.value), self.error / np.sqrt(least), self.dtype)

    def maximum(self, other: Rounded | float) -> Rounded:
        """The larger of two."""
        b = self._operand(other)
        value, error = np.maximum(self.value, b.value), np.maximum(self.error, b.error)
        return Rounded(value, error, self.dtype)


def exact(value: Array | float, dtype: torch.dtype) -> Rounded:
    """A value that ``dtype`` can hold."""
    return Rounded(np.asarray(value, np.float64), np.zeros(()), dtype)


def rounded(value: Array, error: Array, dtype: torch.dtype) -> Rounded:
    """Rounded once: by half the dtype's spacing, which does not shrink below normal numbers."""
    spacing = SPACING[dtype] * np.maximum(np.abs(value) + error, LEAST_NORMAL[dtype])
    return Rounded(value, error + spacing / 2, dtype)


def as_float64(tensor: Tensor) -> Array:
    """A contiguous float64 copy; complex numbers as pairs in a last dimension."""
    tensor = tensor.detach().cpu().resolve_conj()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return np.array(tensor.to(torch.float64).numpy(force=True), order="C")


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


def sgd(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.SGD's documented rule; a momentum buffer starts as its first gradient."""
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    if o["momentum"]:
        buffer = g
        if state:
            buffer = state["momentum_buffer"] * o["momentum"] + g * (1 - o["dampening"])
        state = {"momentum_buffer": buffer}
        g = g + buffer * o["momentum"] if o["nesterov"] else buffer
    return p - g * o["lr"], state


def adam(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.Adam's documented rule; decoupled weight decay makes it AdamW's."""
    zero = exact(np.zeros_like(p.value), p.dtype)
    t = float(state["step"].value) + 1.0 if state else 1.0
    one, lr, beta1, beta2 = (exact(x, o["scalars"]) for x in (1.0, o["lr"], *o["betas"]))
    if o["weight_decay"] and o["decoupled_weight_decay"]:
        p = p * (one - lr * o["weight_decay"])
    elif o["weight_decay"]:
        g = g + p * o["weight_decay"]
    m = state.get("exp_avg", zero) * beta1 + g * (one - beta1)
    v = state.get("exp_avg_sq", zero) * beta2 + g * g * (one - beta2)
    new = {"step": exact(t, torch.float32), "exp_avg": m, "exp_avg_sq": v}
    if o["amsgrad"]:
        v = new["max_exp_avg_sq"] = state.get("max_exp_avg_sq", zero).maximum(v)
    denominator = v.sqrt() / (one - beta2**t).sqrt() + o["eps"]
    return p - m / denominator * (lr / (one - beta1**t)), new


def rmsprop(p: Rounded, g: Rounded, state: State, o: Options) -> tuple[Rounded, State]:
    """torch.optim.RMSprop's documented rule."""
    zero = exact(np.zeros_like(p.value), p.dtype)
    t = float(state["step"].value) + 1.0 if state else 1.0
    if o["weight_decay"]:
        g = g + p * o["weight_decay"]
    v = state.get("square_avg", zero) * o["alpha"] + g * g * (1 - o["alpha"])
    new = {"step": exact(t, torch.float32), "square_avg": v}
    if o["centered"]:
        mean = state.get("grad_avg", zero) * o["alpha"] + g * (1 - o["alpha"])
        new["grad_avg"], v = mean, v - mean * mean
    update = g / (v.sqrt() + o["eps"])
    if o["momentum"]:
        update = state.get("momentum_buffer", zero) * o["momentum"] + update
        new["momentum_buffer"] = update
    return p - update * o["lr"], new


COMMON: Options = {"weight_decay": 0.0, "maximize": False}
ADAM: Options = {**COMMON, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
RULES: dict[str, tuple[Callable[..., tuple[Rounded, State]], Options]] = {
    "SGD": (sgd, {**COMMON, "lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False}),
    "Adam": (adam, {**ADAM, "decoupled_weight_decay": False}),
    "AdamW": (adam, {**ADAM, "decoupled_weight_decay": True, "weight_decay": 1e-2}),
    "RMSprop": (
        rmsprop,
        {**COMMON, "lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
    ),
}
AGC: Options = {"clipping": 1e-2, "agc_eps": 1e-3, "unit_dim": None}


class Oracle:
    """One parameter group of ``torch.optim``'s ``name`` behind AGC; keeps its own state.

    ``params`` and ``states`` hold what each should be after the last `step`, as `Rounded`.
    """

    def __init__(
        self, name: str, params: Sequence[Tensor], tolerance: Tolerance, **options: Any
    ) -> None:
        self.rule, defaults = RULES[name]
        assert options.keys() <= {*defaults, *AGC}
        self.options = {**defaults, **AGC, **options, "scalars": tolerance.scalars}
        self.options["lr"] = float(self.options["lr"])
        self.options["betas"] = tuple(map(float, self.options.get("betas", ())))
        self.tolerance = tolerance
        self.shapes = [p.shape for p in params]
        self.load(params, [{} for _ in params])

    def load(self, params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from an implementation's own values: errors start from nothing again."""
        dtype = self.tolerance.stored
        self.params = [exact(as_float64(p), dtype) for p in params]
        self.states: list[State] = [
            {key: exact(as_float64(value), dtype) for key, value in state.items()}
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
        before = {key: value.to(where.rule) for key, value in self.states[i].items()}
        p, state = self.rule(p.to(where.rule), g.to(where.rule), before, self.options)
        self.params[i] = p.to(where.stored)
        self.states[i] = {
            key: value if key == "step" else value.to(where.stored) for key, value in state.items()
        }

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
