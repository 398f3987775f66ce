"""The report on sharded steps has a row per implementation and number of ranks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import sharded


def test_a_short_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sharded.csv"
    given = ["--model", "tiny", "--ranks", "1", "2", "--steps", "2", "--device", "cpu"]
    sharded.main([*given, "--out", str(out)])
    table = pd.read_csv(out)
    assert list(table.columns) == sharded.COLUMNS
    names = [sharded.OURS, sharded.TORCH, sharded.FUSED, sharded.UNSHARDED]
    assert table["ranks"].tolist() == [1] * 4 + [2] * 4
    assert table["implementation"].tolist() == names * 2
    # One for all units that the two share.
    assert table["collectives"].tolist() == [0] * 4 + [1, 0, 0, 0]
    for ranks, rows in table.groupby("ranks"):
        medians = rows.set_index("implementation")["median_ms"]
        expected = (rows["median_ms"] / medians[sharded.TORCH]).tolist()
        assert rows["ratio_to_torch"].tolist() == pytest.approx(expected), ranks
    assert str(out) in capsys.readouterr().out
