"""The pictures and the table of docs/choosing-clipping.md are of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import choosing_clipping
from benchmarks.lib.compare.grid import GRIDS, all_runs
from benchmarks.lib.compare.training import COLUMNS
from tests.support.places import DEVICE

RUN = next(run for run in all_runs(GRIDS["choosing"]) if run.clipping)


def rows() -> pd.DataFrame:
    """Two epochs of two seeds of one setting, with and without clipping; a run breaks."""
    made: list[dict[str, Any]] = []
    for clipping in (0.0, 0.04):
        for seed in (0, 1):
            for epoch in (1, 2):
                run = RUN._replace(clipping=clipping, seed=seed, epochs=2)._asdict()
                run |= dict.fromkeys(set(COLUMNS) - set(run), 0)
                run |= {"epoch": epoch, "train_loss": 1.0, "test_loss": 1.0}
                run["share_of_units_clipped"] = 0.1 * epoch + 0.2 * seed if clipping else None
                run["test_accuracy"] = 0.5 + 0.1 * seed
                run["diverged"] = bool(seed and not clipping)
                made.append(run)
    return pd.DataFrame(made, columns=COLUMNS)


def test_the_table_has_means_and_ranges_over_the_seeds() -> None:
    summary = choosing_clipping.summarize(choosing_clipping.of_runs(rows()))
    model, optimizer, lr = RUN.model, RUN.optimizer, RUN.lr
    kind = f"{model}, {optimizer}, {lr:g}"
    assert choosing_clipping.markdown(summary).splitlines()[2:] == [
        f"| {kind} | no AGC |  | 55.0% (50.0% to 60.0%) | 1 of 2 |",
        f"| {kind} | AGC 0.04 | 25.0% (15.0% to 35.0%) | 55.0% (50.0% to 60.0%) | 0 of 2 |",
    ]


def test_accuracy_is_drawn_at_the_share_that_was_clipped() -> None:
    summary = choosing_clipping.summarize(choosing_clipping.of_runs(rows()))
    ax: Any = choosing_clipping.draw_accuracy(summary).axes[0]
    drawn = [
        (line.get_marker(), line.get_xdata()[0], line.get_ydata()[0])
        for line in (container.lines[0] for container in ax.containers)
    ]
    assert drawn == [
        ("x", 0.0, pytest.approx(0.55)),
        ("o", pytest.approx(0.25), pytest.approx(0.55)),
    ]


def test_the_course_is_the_mean_of_the_seeds_by_epoch() -> None:
    axes: list[Any] = choosing_clipping.draw_course(rows()).axes
    loss, share = axes
    assert [line.get_label() for line in loss.lines] == ["no AGC", "AGC 0.04"]
    assert list(share.lines[1].get_ydata()) == pytest.approx([0.2, 0.3])


def test_a_network_is_looked_at_before_and_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing_clipping, "EPOCHS", 1)
    found = choosing_clipping.look("transformer", torch.device(DEVICE), tmp_path)
    assert found["epochs_before"].tolist() == [0, 1]
    assert set(found["clipping"]) == {0.01}
    assert (found["clipped"] > 0.5).all()  # of a transformer, from the first step
    for when in ("before", "after"):
        picture = tmp_path / f"choosing-transformer-{when}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_missing_csv_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        choosing_clipping.main([str(tmp_path / "no.csv"), "--out", str(tmp_path)])
    assert "no.csv is no file: python -m benchmarks.compare" in capsys.readouterr().err
