"""Runs share a machine, and one that fails takes no other with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from benchmarks.lib.compare import jobs
from benchmarks.lib.compare.grid import Run
from benchmarks.lib.compare.jobs import Event, Task, perform_all
from benchmarks.lib.compare.training import Row, Where
from tests.benchmarks.compare.runs import RUN

RUNS = [RUN._replace(seed=seed) for seed in range(5)]
DIES, RAISES = RUNS[1], RUNS[2]


def two_rows(run: Run, written: int, where: Where) -> Iterator[Row]:
    for epoch in range(written, 2):
        yield {"epoch": epoch, "process": os.getpid()}
        if run == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if run == RAISES:
            raise MemoryError("no room")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked, which takes no time, and no GPU is touched."""
    monkeypatch.setattr(jobs, "START", "fork")
    monkeypatch.setattr(jobs, "train", two_rows)


def events(runs: list[Run], count: int, where: Where) -> dict[Run, list[Event]]:
    found: dict[Run, list[Event]] = {run: [] for run in runs}
    for event in perform_all([Task(run, 0) for run in runs], count, where):
        found[event.run].append(event)
    return found


def test_runs_are_made_in_processes_that_share_them(where: Where) -> None:
    runs = [run for run in RUNS if run not in (DIES, RAISES)]
    found = events(runs, 2, where)
    rows = [event.row for of_run in found.values() for event in of_run if event.row]
    processes = {row["process"] for row in rows}
    assert len(processes) == 2
    assert os.getpid() not in processes
    for of_run in found.values():
        assert [event.row and event.row["epoch"] for event in of_run] == [0, 1, None]
        assert of_run[-1].failure == ""


@pytest.mark.parametrize("count", [2, 8])
def test_a_process_that_dies_is_replaced(where: Where, count: int) -> None:
    found = events(RUNS, count, where)
    assert found[DIES][-1].failure.startswith("its process ended with -9; out of memory?")
    assert found[RAISES][-1].failure == "MemoryError: no room"
    for run in (RUNS[0], *RUNS[3:]):
        assert len(found[run]) == 3


def test_an_error_ends_its_run_only(where: Where) -> None:
    found = events([RAISES, RUNS[0]], 1, where)
    assert [event.failure for event in found[RAISES]] == ["", "MemoryError: no room"]
    assert len(found[RUNS[0]]) == 3


def test_no_process_is_left_when_nobody_wants_more(where: Where) -> None:
    going = perform_all([Task(run, 0) for run in RUNS[3:]], 2, where)
    row = next(going).row
    assert row is not None
    going.close()
    with pytest.raises(ProcessLookupError):
        os.kill(row["process"], 0)
