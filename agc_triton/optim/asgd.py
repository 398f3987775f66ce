"""ASGD with adaptive gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim.asgd import ASGD, asgd

from agc_triton.optim.functional import rule_of
from agc_triton.optim.optimizer import AGCOptimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments


class ASGD_AGC(AGCOptimizer, ASGD):
    """torch.optim.ASGD with adaptive gradient clipping."""

    rule = rule_of(
        asgd,
        ("lr", "lambd", "alpha", "t0", "weight_decay"),
        ("ax",),
        prepared=4,
        scalars=("step", "mu", "eta"),
    )

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            lambd: float = 1e-4,
            alpha: float = 0.75,
            t0: float = 1e6,
            weight_decay: float = 0,
            foreach: bool | None = None,
            maximize: bool = False,
            differentiable: bool = False,
            capturable: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
