"""Training on the Triton path, every step checked against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.support.cases import build
from tests.support.oracle import AGC, RULES, Oracle
from tests.support.triton_cases import (
    DEVICE,
    TRITON,
    KernelOracle,
    make_grad,
    make_weight,
    states_of,
)

SHAPES = ((3, 20), (6,), (2, 12))
ADAMW: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1}
MOMENTUM: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "dampening": 0.4}


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    return [make_weight(s, seed=seed + i).to(DEVICE, dtype) for i, s in enumerate(SHAPES)]


def options_of(name: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """What an oracle takes of a group's options."""
    return {key: group[key] for key in (*RULES[name][1], *AGC) if key in group}


class Training:
    """An optimizer on the Triton path; `step` compares every parameter and state with an oracle.

    Gradients that are replaced are kept and filled with NaN, so that a stale address shows.
    """

    def __init__(self, name: str, params: Any, **options: Any) -> None:
        self.name = name
        self.optimizer: Any = build(name, params, {**TRITON, **options})
        self._unused: list[Tensor] = []
        self._seed = 0

    @property
    def groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"]]

    def move_grads(
        self, without: Iterable[int] = (), place: Callable[[Tensor], Tensor] = torch.clone
    ) -> None:
        """New gradients in new memory, but for some parameters."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self._unused.append(p.grad.fill_(torch.nan))
            values = make_grad(p.shape, seed=self._seed + i).to(DEVICE, p.dtype)
            p.grad = None if i in without else place(values)
        self._seed += 1

    def oracle(self, p: Tensor, group: Mapping[str, Any]) -> Oracle:
        """An oracle of one parameter as it is now."""
        oracle = KernelOracle(self.name, [p], **options_of(self.name, group))
        oracle.load([p], states_of(self.optimizer, [p]))
        return oracle

    def step(self) -> None:
        """A step on the gradients there are."""
        expected = []
        for group in self.groups:
            for p in group["params"]:
                oracle = self.oracle(p, group)
                oracle.step([p.grad])
                expected.append((oracle, p))
        self.optimizer.step()
        for oracle, p in expected:
            oracle.check([p], states_of(self.optimizer, [p]))

    def train(self, steps: int = 1) -> None:
        """Steps on gradients for all parameters."""
        for _ in range(steps):
            self.move_grads()
            self.step()


def moved(tensor: Tensor) -> Tensor:
    """A copy in other memory; what is left behind must not be written to."""
    return tensor.detach().clone()


def unaligned(tensor: Tensor) -> Tensor:
    buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[1:].view(tensor.shape).copy_(tensor)
