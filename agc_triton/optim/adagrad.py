"""Adagrad with adaptive gradient clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adagrad import Adagrad, adagrad

from agc_triton.optim.functional import arguments, rule_of
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import TensorLists, Update, number

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from agc_triton.options import AGCArguments

_KEYS = ("lr", "lr_decay", "eps", "weight_decay")


def _fused(group: Mapping[str, Any], _dtype: torch.dtype) -> Update:
    options: dict[str, Any] = {k: number(x) for k, x in arguments(group, _KEYS).items()}
    kernel: Any = torch._fused_adagrad_
    options["maximize"] = bool(group["maximize"])

    def update(lists: TensorLists) -> None:
        kernel(lists.params, lists.grads, *lists.states, lists.steps, **options)

    return update


class Adagrad_AGC(AGCOptimizer, Adagrad):
    """torch.optim.Adagrad with adaptive gradient clipping."""

    rule = rule_of(adagrad, _KEYS, ("sum",), prepared=3, fused=_fused, sparse=True)

    def _init_states(self, group: dict[str, Any]) -> None:
        # Where torch does so in the constructor only (2.6), what is added later would have none.
        start = self.defaults["initial_accumulator_value"]
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                value = complex(start, start) if p.is_complex() else start
                device = p.device if group["fused"] else "cpu"
                step = torch.zeros((), dtype=torch.float32, device=device)
                self.state[p] = {"step": step, "sum": torch.full_like(p, value)}
        super()._init_states(group)

    if TYPE_CHECKING:  # torch's arguments and ours, for type checkers and editors

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = 1e-2,
            lr_decay: float = 0,
            weight_decay: float = 0,
            initial_accumulator_value: float = 0,
            eps: float = 1e-10,
            foreach: bool | None = None,
            *,
            maximize: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            **ours: Unpack[AGCArguments],
        ) -> None: ...
