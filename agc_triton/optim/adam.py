"""Adam with adaptive gradient clipping, and what AdamW shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import Adam, adam
from torch.optim.adamw import adamw

from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import Batches, KernelRule, Rule, TensorLists, Update, number

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

    from agc_triton.units import UnitDim

_NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    options = {key: group[key] for key in ("amsgrad", "lr", "weight_decay", "eps", "maximize")}
    return {**options, "beta1": beta1, "beta2": beta2}


def _update(lists: TensorLists, group: Mapping[str, Any], **scaler: Tensor | None) -> None:
    functional: Any = adamw if group.get("decoupled_weight_decay") else adam
    functional(
        lists.params,
        lists.grads,
        *lists.states,
        lists.steps,
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=group["fused"],
        has_complex=any(p.is_complex() for p in lists.params),
        **scaler,
        **_options(group),
    )


def _fused(group: Mapping[str, Any], _dtype: torch.dtype) -> Update:
    decoupled = group.get("decoupled_weight_decay")
    kernel: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
    given = _options(group)
    options: dict[str, Any] = {key: number(given[key]) for key in _NUMBERS}
    options |= {key: bool(given[key]) for key in ("amsgrad", "maximize")}

    def update(lists: TensorLists) -> None:
        kernel(lists.params, lists.grads, *lists.states, lists.steps, **options)

    return update


def _flags(group: Mapping[str, Any]) -> int:
    return int(bool(group["amsgrad"]))


def _states(group: Mapping[str, Any]) -> tuple[str, ...]:
    moments = ("exp_avg", "exp_avg_sq")
    return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return (*options, float(group.get("decoupled_weight_decay", False)))


ADAM = Rule(_update, _fused, KernelRule("adam", _flags, _states, _hyper, 8, ("step",)))


def adam_lists(optimizer: Any, group: dict[str, Any]) -> TensorLists:
    """Parameters with a gradient and their state, created by torch.optim.Adam (AdamW's differs)."""
    lists: list[list[Tensor]] = [[] for _ in range(6)]
    create_state: Any = Adam._init_group
    create_state(optimizer, group, *lists)
    params, grads, *states, steps = lists
    return TensorLists(params, grads, tuple(states), steps)


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
            clipping: float | None = 1e-2,
            agc_eps: float = 1e-3,
            unit_dim: UnitDim = None,
            backend: str = "auto",
            nonfinite: str = "propagate",
            track_clipping: int = 0,
        ) -> None: ...

    def _batches(self, group: dict[str, Any]) -> Batches:
        return [(adam_lists(self, group), group)]
