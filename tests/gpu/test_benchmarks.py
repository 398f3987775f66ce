"""Benchmarks measure kernels on a GPU; how long they take is not tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import digits, training
from benchmarks.lib import rotation
from benchmarks.lib.copying import copy_provider
from benchmarks.lib.measure import Rounds, measure
from benchmarks.lib.providers import providers
from benchmarks.lib.workloads import workload_of
from tests.benchmarks.tiny import SHAPES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    threads, chosen = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = chosen


def test_steps_are_measured_behind_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "MAX_SETS", 3)
    workload = workload_of("tiny", SHAPES, device=torch.device("cuda"))
    compared = [p for p in providers("adamw", "cuda") if p.quick]
    rows = measure("adamw", [*compared, copy_provider("adamw")], workload, Rounds(1, 2))
    assert rows["launches"].notna().all()
    assert set(rows["sets"]) == {3}
    assert (rows[["device_ms", "host_ms", "head_start_ms"]] > 0).all(axis=None)
    assert (rows["alone_ms"] >= rows["host_ms"]).all()
    assert set(rows["device"]) == {torch.cuda.get_device_name()}


def backends(rows: pd.DataFrame, name: str) -> set[str]:
    column = "optimizer" if "optimizer" in rows else "implementation"
    return set(rows.loc[rows[column] == name, "backend"])


def test_the_demo_trains_through_the_kernels(tmp_path: Path) -> None:
    digits.main(["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "digits.csv")
    assert backends(rows, "SGD_AGC") == {"triton"}
    assert backends(rows, "SGD") == {"torch"}
    assert set(rows["device"]) == {torch.cuda.get_device_name()}


def test_training_steps_run_in_the_kernels(tmp_path: Path) -> None:
    out = tmp_path / "training.csv"
    short = ["--models", "demo_nfnet", "--batches", "4", "--steps", "2", "--turns", "1"]
    training.main([*short, "--out", str(out)])
    rows = pd.read_csv(out)
    assert backends(rows, "SGD_AGC") == {"triton"}
    assert rows["loss"].notna().all()
