"""RMSprop with adaptive gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.rmsprop import RMSprop, rmsprop

from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import KernelRule, Rule, TensorLists

_FLAGS = ("foreach", "maximize", "differentiable", "capturable")
_OPTIONS = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")


def _update(lists: TensorLists, group: Mapping[str, Any], **_scaler: Tensor | None) -> None:
    functional: Any = rmsprop
    functional(
        lists.params,
        lists.grads,
        *lists.states,
        lists.steps,
        has_complex=any(p.is_complex() for p in lists.params),
        **{key: group[key] for key in (*_FLAGS, *_OPTIONS)},
    )


def _fused_update(lists: TensorLists, group: Mapping[str, Any]) -> None:
    """torch has no fused RMSprop; its fused Adam and SGD kernels do the same arithmetic.

    With beta1 = 0 and the bias corrections of step infinity, Adam's step is lr * g / (sqrt(v) +
    eps); taken from zeros with lr = 1 it is what RMSprop's momentum adds up, as SGD's does.
    """
    # The fused CPU SGD kernel is wrong for 16 bits up to torch 2.13 (pytorch#191763).
    narrow = lists.params[0].element_size() < 4
    if narrow or group["centered"] or group["alpha"] >= 1.0:
        return _update(lists, {**group, "foreach": False})
    torch._foreach_add_(lists.steps, 1)
    squares, _, buffers = lists.states
    grads, momentum = lists.grads, bool(buffers)
    params = [torch.zeros_like(p) for p in lists.params] if momentum else lists.params
    if momentum and group["weight_decay"] != 0:
        sign = -1.0 if group["maximize"] else 1.0
        torch._foreach_add_(grads, lists.params, alpha=sign * group["weight_decay"])
    torch._fused_adam_(
        params,
        grads,
        grads,  # exp_avg, which beta1 = 0 makes the gradient
        squares,
        [],
        [torch.tensor(math.inf)] * len(params),
        lr=1.0 if momentum else group["lr"],
        beta1=0.0,
        beta2=group["alpha"],
        weight_decay=0.0 if momentum else group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )
    if momentum:
        torch._fused_sgd_(
            lists.params,
            params,
            buffers,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=True,  # the steps from zero are negative
            is_first_step=False,
        )
    return None


def _flags(group: Mapping[str, Any]) -> int:
    return int(group["centered"]) + 2 * int(group["momentum"] > 0)


def _states(group: Mapping[str, Any]) -> int:
    return 1 + int(group["centered"]) + int(group["momentum"] > 0)


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in ("lr", "alpha", "eps", "weight_decay", "momentum"))


class RMSprop_AGC(AGCOptimizer, RMSprop):
    """torch.optim.RMSprop with adaptive gradient clipping."""

    rule = Rule(_update, _fused_update, KernelRule("rmsprop", _flags, _states, _hyper))

    def _batches(self, group: dict[str, Any]) -> Iterator[tuple[TensorLists, Mapping[str, Any]]]:
        params, grads, square_avgs, buffers, grad_avgs, steps = lists = [
            list[Tensor]() for _ in range(6)
        ]
        create_state: Any = self._init_group
        create_state(group, *lists)
        yield TensorLists(params, grads, (square_avgs, grad_avgs, buffers), steps), group
