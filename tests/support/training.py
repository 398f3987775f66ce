"""Training, every step checked against the float64 oracle or unchecked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.support.checks import oracle_for, states_of
from tests.support.formulas import defaults
from tests.support.optimizers import STATEFUL, TRITON, build
from tests.support.oracle import AGC, Oracle
from tests.support.places import DEVICE, Place
from tests.support.tensors import grads_like, parameters, set_grads


def train(optimizer: Optimizer, params: Sequence[Tensor], steps: range) -> None:
    """One update per seed."""
    for seed in steps:
        set_grads(params, seed)
        optimizer.step()


def on_backend(backend: str, seed: int = 0) -> list[Any]:
    """Weights to be stepped on the path of this name; on the torch path they require gradients."""
    params = parameters(seed=seed)
    return [p.data.to(DEVICE) for p in params] if backend == "triton" else list(params)


def with_states(name: str, params: Any, backend: str = "torch", **options: Any) -> Any:
    """An optimizer with every state that it can have."""
    return build(name, params, {**STATEFUL[name], "backend": backend, **options})


def options_of(name: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """What an oracle takes of a group's options."""
    return {key: group[key] for key in (*defaults(name), *AGC) if key in group}


class Training:
    """An optimizer, on the Triton path unless told otherwise, beside an oracle of each parameter.

    Gradients that are replaced are kept and filled with NaN, so that a stale address shows.
    """

    def __init__(self, name: str, params: Any, **options: Any) -> None:
        self.name = name
        self.backend: str = options.get("backend", "triton")
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
        for i, (p, values) in enumerate(
            zip(self.params, grads_like(self.params, self._seed), strict=True)
        ):
            if p.grad is not None:
                self._unused.append(p.grad.fill_(torch.nan))
            p.grad = None if i in without else place(values)
        self._seed += 1

    def oracle(self, p: Tensor, group: Mapping[str, Any]) -> Oracle:
        """An oracle of one parameter as it is now."""
        place = Place(self.optimizer.backend, p.device.type)
        oracle = oracle_for(self.name, [p], place, **options_of(self.name, group))
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
