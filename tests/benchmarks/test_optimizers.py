"""Bytes count what torch's optimizers keep."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from benchmarks.lib.optimizers import OPTIMIZERS, minimal_bytes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_count_the_states_that_torch_keeps(optimizer: str) -> None:
    param = Parameter(torch.ones(5, 3))
    param.grad = torch.ones(5, 3)
    base = OPTIMIZERS[optimizer].torch_class([param], **OPTIMIZERS[optimizer].options)
    base.step()
    states = [s for s in base.state[param].values() if s.shape == param.shape]
    loads, stores = 2 + len(states), 1 + len(states)
    assert minimal_bytes(optimizer, [param]) == 4 * 15 * (loads + stores)
