"""Adamax with adaptive gradient clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim.adamax import Adamax, adamax

from agc_triton.optim.functional import rule_of
from agc_triton.optim.optimizer import AGCOptimizer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments


class Adamax_AGC(AGCOptimizer, Adamax):
    """torch.optim.Adamax with adaptive gradient clipping."""

    rule = rule_of(
        adamax,
        ("lr", "betas", "eps", "weight_decay"),
        ("exp_avg", "exp_inf"),
        prepared=5,
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
            foreach: bool | None = None,
            *,
            maximize: bool = False,
            differentiable: bool = False,
            capturable: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
