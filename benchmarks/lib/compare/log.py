"""The CSV that rows are appended to, and what it says has been done."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from benchmarks.lib.compare.grid import Run
from benchmarks.lib.compare.training import COLUMNS, Row, is_over


class LogError(Exception):
    """A CSV that cannot be gone on with."""


class Log:
    """Rows of runs; every one is whole on the disk before the next."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.written: Counter[Run] = Counter()
        self.over: set[Run] = set()
        if path.exists() and not resume:
            raise LogError(f"{path} exists: --resume goes on with it, --out takes another place")
        if path.exists():
            _drop_torn_end(path)
            self._read()
        if not path.exists() or not path.stat().st_size:
            self._write(COLUMNS)

    def _read(self) -> None:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames not in (None, COLUMNS):
                raise LogError(
                    f"{self.path} has other columns than rows have now: --out takes another place"
                )
            for row in reader:
                self._count(read_run(row), {**row, **_numbers(row)})

    def _count(self, run: Run, row: Row) -> None:
        self.written[run] += 1
        if is_over(row):
            self.over.add(run)

    def append(self, row: Row) -> None:
        """A row of its own."""
        self._write([row[name] for name in COLUMNS])
        self._count(Run(**{name: row[name] for name in Run._fields}), row)

    def _write(self, values: Sequence[object]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)
            file.flush()
            os.fsync(file.fileno())


def read_run(row: dict[str, str]) -> Run:
    """The run that a row of text is of."""
    kinds = get_type_hints(Run)
    return Run(**{name: kinds[name](row[name]) for name in Run._fields})


def _numbers(row: dict[str, str]) -> Row:
    whole: Row = {name: int(row[name]) for name in ("epoch", "epochs")}
    return {**whole, **{name: float(row[name]) for name in ("train_loss", "test_loss")}}


def _drop_torn_end(path: Path) -> None:
    """A line without an end was being written when its process ended."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
