"""What tests of the comparison start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import compare
from benchmarks.lib.compare.training import Where
from tests.support.places import DEVICE


@pytest.fixture
def where(tmp_path: Path) -> Where:
    """One thread, on a GPU where there is one."""
    return Where(DEVICE, {}, tmp_path / "unfinished", 1)


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums do not depend on how many cores there are; threads are as before afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(compare, "cores", lambda: 1)
    yield
    torch.set_num_threads(threads)
