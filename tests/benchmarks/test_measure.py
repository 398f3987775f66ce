"""Measurements are of warm steps with fresh gradients."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.lib.copying import copy_provider
from benchmarks.lib.measure import Rounds, measure
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.providers import providers
from benchmarks.lib.workloads import workload_of
from tests.benchmarks.tiny import SHAPES


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_a_step_keeps_beside_its_state(optimizer: str) -> None:
    workload = workload_of("tiny", SHAPES)
    compared = [*providers(optimizer), copy_provider(optimizer)]
    rows = measure(optimizer, compared, workload, Rounds(1, 1))
    kept = rows.set_index("role")["kept_extra_bytes"]
    assert kept["ours"] == sum(p.nbytes for p in workload.params)  # the small tensors, side by side
    assert set(kept[["wrapper", "peer", "unclipped"]]) == {0}
    assert pd.isna(kept["copy"])
