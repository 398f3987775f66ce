"""AdamW with adaptive gradient clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.adam import Adam
from torch.optim.adamw import AdamW

from agc_triton.optim.adam import ADAM
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import Batches

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments


def _decoupled(group: Mapping[str, Any]) -> dict[str, Any]:
    # torch 2.6 keeps no such key in AdamW's groups.
    return {**group, "decoupled_weight_decay": True}


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return ADAM.kernel.hyper(_decoupled(group))


class AdamW_AGC(AGCOptimizer, AdamW):
    """torch.optim.AdamW with adaptive gradient clipping."""

    rule = ADAM._replace(kernel=ADAM.kernel._replace(hyper=_hyper))
    _init_group = Adam._init_group  # torch 2.6 has another one

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 1e-2,
            amsgrad: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            **ours: Unpack[AGCArguments],
        ) -> None: ...

    def _batches(self, group: dict[str, Any]) -> Batches:
        return super()._batches(_decoupled(group))
