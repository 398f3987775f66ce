"""What the tests of several kernels need."""

from __future__ import annotations

import pytest


@pytest.fixture
def unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor keeps the tile shape that suits it best."""
    from agc_triton.triton_path import buckets

    monkeypatch.setattr(buckets, "LAUNCH_ELEMENTS", -float("inf"))
    monkeypatch.setattr(buckets, "MAX_BUCKETS", 1000)
