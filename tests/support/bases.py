"""Optimizers as third parties write them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SAM(Optimizer):
    """As davda54/sam: step() needs a closure, and uses the gradients that are there first."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def moves(self) -> list[tuple[Tensor, Tensor]]:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        return [(p, p.grad * (self.defaults["rho"] / norm)) for p in params]

    @torch.no_grad()
    def first_step(self) -> None:
        self.moved = self.moves()
        for p, move in self.moved:
            p.add_(move)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, move in self.moved:
            p.sub_(move)
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]  # it needs one
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class Lookahead(Optimizer):
    """As timm's: around another optimizer, without torch's constructor.

    Hooks are never called before its first zero_grad().
    """

    def __init__(self, inner: Optimizer) -> None:
        self._optimizer_step_pre_hooks: dict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: dict[int, Any] = OrderedDict()
        self.inner, self.defaults = inner, {**inner.defaults, "alpha": 0.5}
        self.param_groups, self.state = inner.param_groups, inner.state
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it per closure type
        loss = self.inner.step(closure) if closure else self.inner.step()
        params = [p for g in self.param_groups for p in g["params"]]
        for p, slow in zip(params, self.slow, strict=True):
            p.copy_(slow.lerp_(p, 0.5))
        return loss
