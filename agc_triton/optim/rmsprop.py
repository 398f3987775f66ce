"""RMSprop with adaptive gradient clipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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


def _flags(group: Mapping[str, Any]) -> int:
    return int(group["centered"]) + 2 * int(group["momentum"] > 0)


def _states(group: Mapping[str, Any]) -> int:
    return 1 + int(group["centered"]) + int(group["momentum"] > 0)


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in ("lr", "alpha", "eps", "weight_decay", "momentum"))


class RMSprop_AGC(AGCOptimizer, RMSprop):
    """torch.optim.RMSprop with adaptive gradient clipping."""

    rule = Rule(_update, None, KernelRule("rmsprop", _flags, _states, _hyper))

    def _batches(self, group: dict[str, Any]) -> Iterator[tuple[TensorLists, Mapping[str, Any]]]:
        params, grads, square_avgs, buffers, grad_avgs, steps = lists = [
            list[Tensor]() for _ in range(6)
        ]
        create_state: Any = self._init_group
        create_state(group, *lists)
        yield TensorLists(params, grads, (square_avgs, grad_avgs, buffers), steps), group
