"""Blocks as small as tests' tensors are."""

from __future__ import annotations

import pytest

from agc_triton.torch_path import blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 12)
    monkeypatch.setattr(blocks, "PACKED", 8)
