"""Tensors between guard values, which nothing may write to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.checks import oracle_for, states_of, step_and_check, step_with
from tests.support.optimizers import TRITON, build
from tests.support.places import KERNELS
from tests.support.tensors import grads_like

GUARD = 64
SENTINEL = 32768.0  # exact in every dtype, and seen in any norm it gets into


class Guarded:
    """A copy of a tensor, strides and all, ``offset`` elements from alignment.

    Guard values lie before and behind it, and in the holes that its strides leave.
    """

    def __init__(self, values: Tensor, offset: int = 0) -> None:
        steps = zip(values.shape, values.stride(), strict=True)
        span = sum((size - 1) * step for size, step in steps) + 1 if values.numel() else 0
        size = span + 2 * GUARD + offset
        self._buffer = torch.full((size,), SENTINEL, dtype=values.dtype, device=values.device)
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

    States are those after one step of the torch path. ``offsets`` are elements from alignment for
    "param", "grad" and "state".
    """

    def __init__(
        self,
        name: str,
        weights: Sequence[Tensor],
        options: Mapping[str, Any],
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.options = {**options, **TRITON}
        self.offsets, self.guards = offsets or {}, list[Guarded]()
        donor = build(name, weights, {**self.options, "backend": "torch"})
        before = [w.clone() for w in weights]
        step_with(donor, weights, grads_like(weights, 0, self.options.get("unit_dim")))
        self.params = [self._guarded(p, "param") for p in before]
        self.optimizer: Any = build(name, self.params, self.options)
        for old, new in zip(weights, self.params, strict=True):
            for key, value in donor.state[old].items():
                guarded = value.clone() if key == "step" else self._guarded(value, "state")
                self.optimizer.state[new][key] = guarded
        self.oracle = oracle_for(name, self.params, KERNELS, **self.options)

    def _guarded(self, values: Tensor, role: str) -> Tensor:
        self.guards.append(Guarded(values, self.offsets.get(role, 0)))
        return self.guards[-1].tensor

    def step(self, grads: Sequence[Tensor] | None = None) -> None:
        """One step on gradients laid out as their parameters, or on those given, and all checks."""
        if grads is None:
            values = grads_like(self.params, 0, self.options.get("unit_dim"))
            grads = [self._guarded(value, "grad") for value in values]
        self.oracle.load(self.params, states_of(self.optimizer, self.params))
        step_and_check(self.optimizer, self.oracle, self.params, grads)
        for guard in self.guards:
            guard.assert_intact()
