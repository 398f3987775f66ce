"""Adam with adaptive gradient clipping, and what AdamW shares with it.

More than a rule and a class, as torch has fused CPU kernels for the two, and amsgrad a third state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import Adam, adam
from torch.optim.adamw import adamw

from agc_triton.optim.functional import arguments, updating
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import KernelRule, Rule, TensorLists, Update, number

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments

_ROLES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_NUMBERS = ("lr", "betas", "eps", "weight_decay")
_ADAM, _ADAMW = (updating(functional, (*_NUMBERS, "amsgrad")) for functional in (adam, adamw))


def _update(lists: TensorLists, group: Mapping[str, Any], **scaler: Tensor | None) -> None:
    update = _ADAMW if group.get("decoupled_weight_decay") else _ADAM
    update(lists, group, **scaler)


def _fused(group: Mapping[str, Any], _dtype: torch.dtype) -> Update:
    decoupled = group.get("decoupled_weight_decay")
    kernel: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
    options: dict[str, Any] = {k: number(x) for k, x in arguments(group, _NUMBERS).items()}
    options |= {key: bool(group[key]) for key in ("amsgrad", "maximize")}

    def update(lists: TensorLists) -> None:
        kernel(lists.params, lists.grads, *lists.states, lists.steps, **options)

    return update


def _flags(group: Mapping[str, Any]) -> int:
    return int(bool(group["amsgrad"]))


def _states(group: Mapping[str, Any]) -> tuple[str, ...]:
    return _ROLES if group["amsgrad"] else _ROLES[:2]


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    options = arguments(group, _NUMBERS).values()
    return (*options, float(group.get("decoupled_weight_decay", False)))


ADAM = Rule(_update, _fused, KernelRule("adam", _flags, _states, _hyper, 8, ("step",)), _ROLES)


class Adam_AGC(AGCOptimizer, Adam):
    """torch.optim.Adam with adaptive gradient clipping."""

    rule = ADAM

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            amsgrad: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            decoupled_weight_decay: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
