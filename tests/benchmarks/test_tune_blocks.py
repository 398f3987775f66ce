"""Block sizes are compared with each other; nothing here is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from torch import Tensor

from agc_triton.torch_path import blocks
from benchmarks import tune_blocks
from benchmarks.lib.providers import Provider
from benchmarks.lib.rows import COLUMNS


def test_sweep_writes_one_row_per_block_size(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    tune_blocks.main(["--quick", "--optimizers", "adamw", "--out", str(out)])
    table = pd.read_csv(out)
    assert list(table.columns) == [*COLUMNS, "block"]
    assert list(table["block"].dropna()) == tune_blocks.BLOCKS
    assert f"blocks.py has {blocks.BLOCK}" in capsys.readouterr().out


def test_block_size_holds_during_the_step_only() -> None:
    seen: list[int] = []

    def build(_: list[Tensor]) -> Callable[[], object]:
        return lambda: seen.append(blocks.BLOCK)

    before = blocks.BLOCK
    provider = Provider("agc_triton", "", "ours", True, build)
    tune_blocks.with_block(provider, 2 * before).build([])()
    assert [*seen, blocks.BLOCK] == [2 * before, before]
