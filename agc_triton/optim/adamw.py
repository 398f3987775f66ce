"""AdamW with adaptive gradient clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.adamw import AdamW

from agc_triton.optim.adam import ADAM, adam_lists
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import Batches


def _decoupled(group: Mapping[str, Any]) -> dict[str, Any]:
    # torch 2.6 keeps no such key in AdamW's groups.
    return {**group, "decoupled_weight_decay": True}


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return ADAM.kernel.hyper(_decoupled(group))


class AdamW_AGC(AGCOptimizer, AdamW):
    """torch.optim.AdamW with adaptive gradient clipping."""

    rule = ADAM._replace(kernel=ADAM.kernel._replace(hyper=_hyper))

    def _batches(self, group: dict[str, Any]) -> Batches:
        return [(adam_lists(self, group), _decoupled(group))]
