"""Rows are written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.lib.rows import write


def test_a_failed_write_leaves_the_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    before = pd.DataFrame({"a": [1]})
    write(before, out)

    def half_written(_: pd.DataFrame, path: Path, **_options: Any) -> None:
        Path(path).write_text("a\n")
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half_written)
    with pytest.raises(OSError, match="No space"):
        write(before, out)
    pd.testing.assert_frame_equal(pd.read_csv(out), before)
