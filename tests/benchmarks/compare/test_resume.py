"""A grid that is killed goes on without repeating or losing a row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.lib.compare.jobs import Event
from benchmarks.lib.compare.log import Log, LogError
from benchmarks.lib.compare.training import COLUMNS
from tests.benchmarks.compare.runs import GRID, ROWS, RUN, read
from tests.benchmarks.data_files import random_images, write_idx

pytestmark = pytest.mark.usefixtures("one_core")
ROOT = Path(__file__).parents[3]
# Imported by each process of the grid: an epoch takes some time, on one thread.
SLOWLY = """
import sys, time
from benchmarks import compare
from benchmarks.lib.compare import jobs, training
jobs.START, compare.cores, save = "{start}", lambda: 1, training.Training.save
training.Training.save = lambda *given: (time.sleep(0.1), save(*given))
if __name__ == "__main__":
    compare.main(sys.argv[1:])
"""


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def gone(pid: int) -> bool:
    """Ended, or about to be told to whoever started it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize(
    "start",
    ["fork", pytest.param("spawn", marks=pytest.mark.soak)],  # each imports for seconds
)
def test_a_grid_that_is_killed_goes_on(tmp_path: Path, start: str) -> None:
    out, whole = tmp_path / "killed.csv", tmp_path / "whole.csv"
    (tmp_path / "data").mkdir()
    images, test_images = (random_images(200, 1, 8, 10, seed) for seed in range(2))
    write_idx(tmp_path / "data", images, test_images, zipped=True)
    grid = [f"mnist={tmp_path / 'data'}" if word == "digits" else word for word in GRID]
    script = tmp_path / "slowly.py"
    script.write_text(SLOWLY.replace("{start}", start))
    command = [sys.executable, str(script), *grid, "--jobs", "2", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while lines(out) < 4 and process.poll() is None:
            time.sleep(0.01)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    # Whoever goes on must be alone.
    deadline = time.monotonic() + 20
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(map(gone, workers))
    before = out.read_text()
    assert 4 <= lines(out) < ROWS
    compare.main([*grid, "--resume", "--out", str(out)])
    compare.main([*grid, "--out", str(whole)])
    assert out.read_text().startswith(before)
    assert lines(out) == 1 + ROWS
    assert read(out) == read(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("data", "killed.csv", "slowly.py", "whole.csv")
    ]


def test_a_row_that_was_being_written_is_written_again(tmp_path: Path) -> None:
    out, whole = tmp_path / "torn.csv", tmp_path / "whole.csv"
    compare.main([*GRID, "--out", str(whole)])
    content = whole.read_bytes()
    for end in (content.rfind(b"\n", 0, -1) + 9, len(COLUMNS[0]), 0):
        out.write_bytes(content[:end])
        compare.main([*GRID, "--resume", "--out", str(out)])
        assert read(out) == read(whole)


def test_what_is_over_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    broken = [*GRID[:8], "--lrs", "1e9", *GRID[10:]]
    with monkeypatch.context() as killed:
        killed.setattr(compare, "forget", lambda run, where: None)
        compare.main([*broken, "--out", str(out)])
    before = out.read_bytes()
    kept = tmp_path / "rows.unfinished"
    first = next(kept.iterdir())
    first.with_suffix(".1234").touch()  # as a kill leaves it while a run is being saved
    monkeypatch.setattr(compare, "perform_all", lambda tasks, *_: iter(tasks and [1 / 0]))
    compare.main([*broken, "--resume", "--out", str(out)])
    assert out.read_bytes() == before
    assert not kept.exists()
    assert f"4 runs are in {out}" in capsys.readouterr().out


def test_a_csv_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    Log(out, resume=False).append({**dict.fromkeys(COLUMNS, 1), **RUN._asdict(), "epoch": 1})
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        compare.main([*GRID, "--out", str(out)])
    assert f"{out} exists: --resume goes on with it" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert Log(out, resume=True).written == {RUN: 1}


def test_a_csv_of_something_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(LogError, match="other columns"):
        Log(out, resume=True)


def test_a_run_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.lib.compare.training.classifier", lambda *_: os.stat("absent"))
        with pytest.raises(SystemExit, match="4 runs were not"):
            compare.main([*GRID, "--out", str(out)])
    assert "FileNotFoundError" in capsys.readouterr().err
    compare.main([*GRID, "--resume", "--out", str(out)])
    assert lines(out) == 1 + ROWS


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[Event]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(compare, "perform_all", interrupted)
    with pytest.raises(SystemExit, match=r"0 of 4 runs are in .*: --resume goes on"):
        compare.main([*GRID, "--out", str(tmp_path / "rows.csv")])
