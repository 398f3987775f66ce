"""AdamW with adaptive gradient clipping."""

from __future__ import annotations

from typing import Any

from torch.optim.adamw import AdamW

from agc_triton.optim.adam import ADAM, adam_lists
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import Batches


class AdamW_AGC(AGCOptimizer, AdamW):
    """torch.optim.AdamW with adaptive gradient clipping."""

    rule = ADAM

    def _batches(self, group: dict[str, Any]) -> Batches:
        # torch 2.6 keeps no such key in AdamW's groups.
        yield adam_lists(self, group), {**group, "decoupled_weight_decay": True}
