"""Benchmarks measure kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lib import rotation
from benchmarks.lib.copying import copy_provider
from benchmarks.lib.measure import Rounds, measure
from benchmarks.lib.providers import providers
from benchmarks.lib.workloads import workload_of
from tests.benchmarks.tiny import SHAPES


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "MAX_SETS", 3)
    workload = workload_of("tiny", SHAPES, device=torch.device("cuda"))
    compared = [p for p in providers("adamw", "cuda") if p.quick]
    rows = measure("adamw", [*compared, copy_provider("adamw")], workload, Rounds(1, 2))
    assert rows["launches"].notna().all()
    assert set(rows["sets"]) == {3}
    assert (rows[["device_ms", "host_ms", "alone_ms"]] > 0).all(axis=None)
    assert (rows["head_start_ms"] > rows["host_ms"]).all()
    assert (rows["alone_ms"] > rows["host_ms"]).all()
    assert set(rows["device"]) == {torch.cuda.get_device_name()}
