"""Adadelta with adaptive gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim.adadelta import Adadelta, adadelta

from agc_triton.optim.functional import rule_of
from agc_triton.optim.optimizer import AGCOptimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments


class Adadelta_AGC(AGCOptimizer, Adadelta):
    """torch.optim.Adadelta with adaptive gradient clipping."""

    rule = rule_of(
        adadelta,
        ("lr", "rho", "eps", "weight_decay"),
        ("square_avg", "acc_delta"),
        prepared=5,
        foreach=True,
    )

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1.0,
            rho: float = 0.9,
            eps: float = 1e-6,
            weight_decay: float = 0,
            foreach: bool | None = None,
            *,
            capturable: bool = False,
            maximize: bool = False,
            differentiable: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
