"""NAdam with adaptive gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim.nadam import NAdam, nadam

from agc_triton.optim.functional import rule_of
from agc_triton.optim.optimizer import AGCOptimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments


class NAdam_AGC(AGCOptimizer, NAdam):
    """torch.optim.NAdam with adaptive gradient clipping."""

    rule = rule_of(
        nadam,
        ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
        ("exp_avg", "exp_avg_sq"),
        prepared=9,
        scalars=("step", "mu_product"),
        foreach=True,
    )

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 2e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            momentum_decay: float = 4e-3,
            decoupled_weight_decay: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
