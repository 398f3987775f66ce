"""RMSprop with adaptive gradient clipping.

More than a rule and a class, as its fused update is put together from torch's for Adam and SGD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.rmsprop import RMSprop, rmsprop

from agc_triton.optim.functional import arguments, updating
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import KernelRule, Rule, TensorLists, Update, number

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments

_INFINITY = torch.tensor(math.inf, device="cpu")

_NUMBERS = ("lr", "alpha", "eps", "weight_decay", "momentum")
_ROLES = ("square_avg", "grad_avg", "momentum_buffer")


def _fused(group: Mapping[str, Any], dtype: torch.dtype) -> Update | None:
    """torch has no fused RMSprop; its fused Adam and SGD kernels do the same arithmetic.

    With beta1 = 0 and the bias corrections of step infinity, Adam's step is lr * g / (sqrt(v) +
    eps); taken from zeros with lr = 1 it is what RMSprop's momentum adds up, as SGD's does.
    """
    lr, alpha, eps, decay, momentum = map(number, _hyper(group))
    maximize = bool(group["maximize"])
    # The fused CPU SGD kernel is wrong for 16 bits up to torch 2.13 (pytorch#191763).
    if dtype.itemsize < 4 or group["centered"] or alpha >= 1.0:
        return None
    adam: dict[str, Any] = {
        "lr": 1.0 if momentum else lr,
        "beta1": 0.0,
        "beta2": alpha,
        "eps": eps,
        "weight_decay": 0.0 if momentum else decay,
        "amsgrad": False,
        "maximize": maximize,
    }
    sgd: dict[str, Any] = {
        "lr": lr,
        "momentum": momentum,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "is_first_step": False,
        "maximize": True,  # the steps from zero are negative
    }

    def update(lists: TensorLists) -> None:
        squares, _, buffers = lists.states
        grads = lists.grads
        params = [torch.zeros_like(p) for p in lists.params] if buffers else lists.params
        if buffers and decay != 0:
            torch._foreach_add_(grads, lists.params, alpha=-decay if maximize else decay)
        # The gradient stands for exp_avg, which beta1 = 0 makes it.
        counts = [_INFINITY] * len(params)
        torch._fused_adam_(params, grads, grads, squares, [], counts, **adam)
        if buffers:
            torch._fused_sgd_(lists.params, params, buffers, **sgd)

    return update


def _flags(group: Mapping[str, Any]) -> int:
    return int(bool(group["centered"])) + 2 * int(group["momentum"] > 0)


def _states(group: Mapping[str, Any]) -> tuple[str, ...]:
    there = True, group["centered"], group["momentum"] > 0
    return tuple(compress(_ROLES, there))


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(arguments(group, _NUMBERS).values())


class RMSprop_AGC(AGCOptimizer, RMSprop):
    """torch.optim.RMSprop with adaptive gradient clipping."""

    rule = Rule(
        updating(rmsprop, (*_NUMBERS, "centered")),
        _fused,
        KernelRule("rmsprop", _flags, _states, _hyper, 6, ("step",)),
        _ROLES,
    )

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            alpha: float = 0.99,
            eps: float = 1e-8,
            weight_decay: float = 0,
            momentum: float = 0,
            centered: bool = False,
            capturable: bool = False,
            foreach: bool | None = None,
            maximize: bool = False,
            differentiable: bool = False,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
