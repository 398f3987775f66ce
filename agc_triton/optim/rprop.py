"""Rprop with adaptive gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim.rprop import Rprop, rprop

from agc_triton.optim.functional import rule_of
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import number

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments


class Rprop_AGC(AGCOptimizer, Rprop):
    """torch.optim.Rprop with adaptive gradient clipping."""

    rule = rule_of(rprop, ("etas", "step_sizes"), ("prev", "step_size"), prepared=4, foreach=True)

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            etas: tuple[float, float] = (0.5, 1.2),
            step_sizes: tuple[float, float] = (1e-6, 50),
            *,
            capturable: bool = False,
            foreach: bool | None = None,
            maximize: bool = False,
            differentiable: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...

    def _init_states(self, group: dict[str, Any]) -> None:
        """As torch, but for step sizes: those are made like the gradient there."""
        new = [p for p in group["params"] if p.grad is not None and not self.state.get(p)]
        super()._init_states(group)
        for p in new:
            lr = number(group["lr"])
            size = complex(lr, lr) if p.is_complex() else lr
            self.state[p]["step_size"] = torch.full_like(p, size)
