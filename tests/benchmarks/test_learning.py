"""The schedule that training runs share."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from benchmarks.lib.learning import warmup_and_cosine


def test_the_rate_rises_and_then_falls_to_nothing() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_and_cosine(optimizer, steps=8, warmup=4)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.5)
    assert rates[4] == pytest.approx(1.0)
    assert max(rates) < 2.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
