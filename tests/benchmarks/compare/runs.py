"""Runs that take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.lib.compare.grid import Run

RUN = Run("digits", 0, 160, "cnn", "sgd", 0.04, 64, 0.1, 0, 3, "float32")
# Of a row, what is another whenever it is made.
PASSING = ["seconds", "images_per_s", "timestamp", "version"]
GRID = [
    *("--data", "digits", "--images", "160", "--models", "cnn", "--batches", "64", "--lrs", "0.1"),
    *("--clippings", "0", "0.04", "--seeds", "2", "--epochs", "4", "--device", "cpu"),
]
ROWS = 2 * 2 * 4  # clippings, seeds and epochs of it


def lasting(rows: Any) -> list[dict[str, Any]]:
    """Rows without what passes; NaN is equal to itself."""
    table = pd.DataFrame(rows).drop(columns=PASSING)
    found: list[Any] = table.astype(object).where(table.notna(), None).to_dict("records")
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """A CSV's, in the order of their runs and epochs."""
    table = pd.read_csv(path)
    return lasting(table.sort_values([*Run._fields, "epoch"], ignore_index=True))
