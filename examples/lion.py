"""Lion as an AGC class: how an optimizer that is none of torch's is made one.

``Lion`` stands for a third party's: it makes its states in ``step``, not in `_init_group`. Its AGC
class says how states are made, and what one step does, once with torch and once for the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import KernelRule, Rule, TensorLists


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675), as packages have it."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("exp_avg", torch.zeros_like(p))
                    update(TensorLists([p], [p.grad], ([state["exp_avg"]],), []), group)
        return loss


def update(lists: TensorLists, group: Mapping[str, Any], **_scaler: Tensor | None) -> None:
    """Lion's step of some parameters; their gradients are only read."""
    (exp_avgs,), (beta1, beta2) = lists.states, group["betas"]
    blends = torch._foreach_lerp(exp_avgs, lists.grads, 1.0 - beta1)
    torch._foreach_sign_(blends)
    torch._foreach_mul_(lists.params, 1.0 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(lists.params, blends, alpha=-group["lr"])
    torch._foreach_lerp_(exp_avgs, lists.grads, 1.0 - beta2)


class Lion_AGC(AGCOptimizer, Lion):  # type: ignore[misc]  # torch overloads step
    """Lion with adaptive gradient clipping."""

    rule = Rule(
        update,
        fused=lambda group, dtype: None,
        kernel=KernelRule(
            "examples.lion_rule:lion",
            flags=lambda group: 0,
            states=lambda group: ("exp_avg",),
            hyper=lambda group: (group["lr"], *group["betas"], group["weight_decay"]),
            prepared=4,
        ),
        roles=("exp_avg",),
    )

    def _init_states(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
