"""SGD with adaptive gradient clipping.

More than a rule and a class, as torch has a fused CPU kernel, and starts momentum as a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.sgd import SGD, sgd

from agc_triton.optim.functional import updating
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import Batches, KernelRule, Rule, TensorLists, Update, number

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments

_NUMBERS = ("weight_decay", "momentum", "lr", "dampening")
_SGD = updating(sgd, (*_NUMBERS, "nesterov"))


def _update(lists: TensorLists, group: Mapping[str, Any], **scaler: Tensor | None) -> None:
    first = group.get("is_first_step", False)
    (buffers,) = lists.states
    given: list[Any] = [None] * len(buffers) if first else buffers
    _SGD(lists._replace(states=(given,)), group, **scaler)
    if first:
        for buffer, started in zip(buffers, given, strict=True):
            buffer.copy_(started)


def _fused(group: Mapping[str, Any], dtype: torch.dtype) -> Update | None:
    options: dict[str, Any] = {key: number(group[key]) for key in _NUMBERS}
    options |= {key: bool(group[key]) for key in ("nesterov", "maximize", "is_first_step")}
    if dtype.itemsize < 4:
        return None  # torch's fused CPU kernel is wrong for 16 bits up to 2.13 (pytorch#191763)

    def update(lists: TensorLists) -> None:
        torch._fused_sgd_(lists.params, lists.grads, lists.states[0], **options)

    return update


def _flags(group: Mapping[str, Any]) -> int:
    return int(group["momentum"] != 0) + 2 * int(bool(group["nesterov"]))


def _states(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in ("lr", "momentum", "dampening", "weight_decay"))


class SGD_AGC(AGCOptimizer, SGD):
    """torch.optim.SGD with adaptive gradient clipping."""

    rule = Rule(
        _update, _fused, KernelRule("sgd", _flags, _states, _hyper, prepared=4, own_scalars=1)
    )

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-3,
            momentum: float = 0,
            dampening: float = 0,
            weight_decay: float | Tensor = 0,
            nesterov: bool = False,
            *,
            maximize: bool = False,
            foreach: bool | None = None,
            differentiable: bool = False,
            fused: bool | None = None,
            **ours: Unpack[AGCArguments],
        ) -> None: ...

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; torch would load one without ``fused`` as ``fused=False``."""
        for group in state.get("param_groups", ()):
            group.setdefault("fused", None)
        super().__setstate__(state)

    def _batches(self, group: dict[str, Any]) -> Batches:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Any] = []
        create_state: Any = self._init_group
        create_state(group, params, grads, buffers)
        # torch.optim.SGD starts a momentum buffer as its first gradient, without dampening.
        first = [i for i, buffer in enumerate(buffers) if buffer is None]
        for i in first:
            # As sparse as torch would leave it.
            like = grads[i] if grads[i].is_sparse else params[i]
            buffers[i] = self.state[params[i]]["momentum_buffer"] = torch.zeros_like(like)
        later = sorted(set(range(len(params))).difference(first))
        lists = TensorLists(params, grads, (buffers,), [])
        return [
            (lists.select(first), {**group, "is_first_step": True}),
            (lists.select(later), {**group, "is_first_step": False}),
        ]
