"""What the tests of the Triton path share: where it runs, its oracle, memory between guards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agc_triton.triton_path.buckets import BucketPlan, TileShape
from agc_triton.triton_path.launches import Launch
from agc_triton.triton_path.plan import TritonPlan
from tests.support.cases import Kwargs, build, step_with
from tests.support.oracle import Oracle, Rounded, as_float64, clip, exact
from tests.support.tolerances import TOLERANCES, Tolerance

# Without a GPU the kernels run in Triton's interpreter, on CPU tensors (conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIPPING = 0.05
TRITON: Kwargs = {"clipping": CLIPPING, "backend": "triton"}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The entry of the tolerance table for the kernels."""
    key = f"{str(dtype.to_real()).removeprefix('torch.')}, Triton"
    interpreted = f"{key} interpreted"
    return TOLERANCES[interpreted if DEVICE == "cpu" and interpreted in TOLERANCES else key]


def on_device(value: Any) -> Any:
    """Tensors, in a list or a dict or as they are, on the device of the tests."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {key: on_device(item) for key, item in value.items()}
    return type(value)(map(on_device, value)) if isinstance(value, (list, tuple)) else value


class KernelOracle(Oracle):
    """Holds whatever is not stored in fp32 (fp64): also the clipped gradient of 16-bit parameters.

    With 16 bits, `load` the implementation's values before each step.
    """

    def __init__(self, name: str, params: Sequence[Tensor], **options: Any) -> None:
        self.entry = tolerance(params[0].dtype)
        narrow = self.entry.stored is not self.entry.rule
        self.compute = tolerance(self.entry.rule) if narrow else self.entry
        known = {k: v for k, v in options.items() if k not in ("backend", "capturable")}
        super().__init__(name, params, self.compute, **known)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """As the kernels do it."""
        self.tolerance = self.compute
        super().step(grads)
        if self.entry is not self.compute:
            self.params = [self._stored(p) for p in self.params]
            self.states = [
                {key: x if key == "step" else self._stored(x) for key, x in state.items()}
                for state in self.states
            ]
            self.tolerance = self.entry

    def _stored(self, x: Rounded) -> Rounded:
        return Rounded(x.value, self.compute.margin * x.error, x.dtype).to(self.entry.stored)


def unit_values(
    shape: Sequence[int], unit_dim: int | None, scales: Sequence[float], seed: int
) -> Tensor:
    """Normal float64 values times one scale per unit, the scales in turn.

    The first and the last element of a unit hold most of its norm: losing one shows.
    """
    rng = torch.Generator().manual_seed(seed)
    whole = sum(size != 1 for size in shape) <= 1
    dim = 0 if unit_dim is None or whole else unit_dim % len(shape)
    units = 1 if whole else shape[dim]
    length = math.prod(shape) // units
    rows = torch.randn(units, length, generator=rng, dtype=torch.float64)
    rows[:, 0] = math.sqrt(length)
    rows[:, -1] = -math.sqrt(length)
    rows *= torch.tensor([scales[(u + seed) % len(scales)] for u in range(units)])[:, None]
    if whole:
        return rows.reshape(tuple(shape))
    rest = [size for d, size in enumerate(shape) if d != dim]
    return rows.reshape(units, *rest).movedim(0, dim).contiguous()


def make_weight(shape: Sequence[int], unit_dim: int | None = None, seed: int = 0) -> Tensor:
    """A float64 weight."""
    return unit_values(shape, unit_dim, (1.0, 0.5, 2.0), seed)


def make_grad(shape: Sequence[int], unit_dim: int | None = None, seed: int = 0) -> Tensor:
    """A float64 gradient whose units are far over and under the limit by turns."""
    return unit_values(shape, unit_dim, (1.0, 0.01), seed)


def check_clipped(
    weight: Tensor, before: Tensor, after: Tensor | None, **options: float | None
) -> None:
    """Assert that a gradient has been clipped against its weight; it may be on its limit."""
    assert after is not None
    entry = tolerance(weight.dtype)
    p, g = (exact(as_float64(t), entry.stored).to(entry.norms) for t in (weight, before))
    options = {"clipping": CLIPPING, "agc_eps": 1e-3, "unit_dim": None, **options}
    expected = clip(p, g, weight.shape, options, entry.stored)
    margin = max(entry.margin, tolerance(entry.rule).margin)
    # The error is 0 where a unit is under its limit, which keeps its bits.
    assert np.all(np.abs(as_float64(after) - expected.value) <= margin * expected.error)


def states_of(optimizer: Any, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The optimizer's state of each parameter."""
    return [optimizer.state.get(p, {}) for p in params]


def plan_of(optimizer: Any) -> TritonPlan:
    """The plan that an optimizer has made."""
    plan = optimizer._paths.triton.plan
    assert isinstance(plan, TritonPlan)
    return plan


def bucket_plans(optimizer: Any) -> list[BucketPlan]:
    """What the planner decided, per dtype and set of flags."""
    return [part.launches.plan for part in plan_of(optimizer).parts]


def bound_args(launch: Launch) -> dict[str, Any]:
    """The arguments that a launch keeps from step to step, by name."""
    names = launch.kernel.arg_names
    return dict(zip(names[len(names) - len(launch.bound) :], launch.bound, strict=True))


def tile_shapes(optimizer: Any) -> set[TileShape]:
    """The tile shapes that a step launches."""
    return {bucket.shape for plan in bucket_plans(optimizer) for bucket in plan.buckets}


GUARD = 64
SENTINEL = 32768.0  # exact in every dtype, and seen in any norm it gets into


class Guarded:
    """A copy of a tensor, strides and all, ``offset`` elements from alignment.

    Guard values lie before and behind it, and in the holes that its strides leave.
    """

    def __init__(self, values: Tensor, offset: int = 0, device: str = DEVICE) -> None:
        steps = zip(values.shape, values.stride(), strict=True)
        span = sum((size - 1) * step for size, step in steps) + 1 if values.numel() else 0
        size = span + 2 * GUARD + offset
        self._buffer = torch.full((size,), SENTINEL, dtype=values.dtype, device=device)
        self._where = values.shape, values.stride(), GUARD + offset
        self.tensor = self._buffer.as_strided(*self._where)
        self.tensor.copy_(values)

    def abandon(self) -> None:
        """The tensor's own memory is guarded too from now on."""
        self.tensor.fill_(SENTINEL)
        self._where = torch.Size((0,)), (1,), 0

    def assert_intact(self) -> None:
        """Nothing has been written beside the tensor."""
        outside = torch.ones_like(self._buffer, dtype=torch.bool)
        outside.as_strided(*self._where).fill_(False)
        assert bool((self._buffer[outside] == SENTINEL).all())


class GuardedRun:
    """A kernel step against the oracle, with every tensor it touches between guard bands.

    Weights are float64 values; states are those after one step of the torch path. ``offsets``
    are elements from alignment for "param", "grad" and "state".
    """

    def __init__(
        self,
        name: str,
        weights: Sequence[Tensor],
        options: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.options = {**options, **TRITON}
        self.offsets, self.guards = offsets or {}, list[Guarded]()
        before = [weight.to(dtype) for weight in weights]
        donor = build(name, before, {**self.options, "backend": "torch"})
        unit_dim = self.options.get("unit_dim")
        grads = [make_grad(p.shape, unit_dim, seed=100 + i) for i, p in enumerate(before)]
        step_with(donor, before, [self._like(p, g) for p, g in zip(before, grads, strict=True)])
        self.params = [self._guarded(p, "param") for p in before]
        self.optimizer: Any = build(name, self.params, self.options)
        for old, new in zip(before, self.params, strict=True):
            for key, value in donor.state[old].items():
                guarded = value.clone() if key == "step" else self._guarded(value, "state")
                self.optimizer.state[new][key] = guarded
        self.oracle = KernelOracle(name, self.params, **self.options)

    @staticmethod
    def _like(param: Tensor, values: Tensor) -> Tensor:
        return torch.empty_like(param, device="cpu").copy_(values)

    def _guarded(self, values: Tensor, role: str) -> Tensor:
        self.guards.append(Guarded(values, self.offsets.get(role, 0)))
        return self.guards[-1].tensor

    def step(self, seed: int = 0, grads: Sequence[Tensor] | None = None) -> None:
        """One step on gradients laid out as their parameters, or on those given, and all checks."""
        if grads is None:
            values = [make_grad(p.shape, self.options.get("unit_dim"), seed) for p in self.params]
            pairs = zip(self.params, values, strict=True)
            grads = [self._guarded(self._like(p, value), "grad") for p, value in pairs]
        self.oracle.load(self.params, states_of(self.optimizer, self.params))
        self.oracle.step(grads)
        step_with(self.optimizer, self.params, grads)
        self.oracle.check(self.params, states_of(self.optimizer, self.params))
        for guard in self.guards:
            guard.assert_intact()
