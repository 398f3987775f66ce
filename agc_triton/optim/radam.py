"""RAdam with adaptive gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim.radam import RAdam, radam

from agc_triton.optim.functional import rule_of
from agc_triton.optim.optimizer import AGCOptimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments


class RAdam_AGC(AGCOptimizer, RAdam):
    """torch.optim.RAdam with adaptive gradient clipping."""

    rule = rule_of(
        radam,
        ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"),
        ("exp_avg", "exp_avg_sq"),
        prepared=8,
        foreach=True,
    )

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            decoupled_weight_decay: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
