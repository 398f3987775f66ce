"""What the tests of several benchmarks start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import throughput, tune_blocks
from benchmarks.lib import workloads
from tests.benchmarks.tiny import SHAPES, write_shapes


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One small model in place of all, and the thread count as it was afterwards."""
    threads = torch.get_num_threads()
    tables = tmp_path / "shapes"
    tables.mkdir()
    write_shapes(tables / "tiny.csv", SHAPES)
    monkeypatch.setattr(workloads, "TABLES", tables)
    for command in (throughput, tune_blocks):
        monkeypatch.setattr(command, "MODEL", "tiny")
    yield "tiny"
    torch.set_num_threads(threads)
