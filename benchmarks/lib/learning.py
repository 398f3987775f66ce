"""What training runs share: the schedule of the learning rate, and when a run counts as broken."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_and_cosine(optimizer: Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Linear warm-up over so many of the steps, times a cosine that ends at 0."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2

    return LambdaLR(optimizer, factor)


def is_broken(loss: float, accuracy: float, classes: int) -> bool:
    """Whether a loss is not finite, or an accuracy below twice that of guessing."""
    return not math.isfinite(loss) or bool(accuracy < 2 / classes)
