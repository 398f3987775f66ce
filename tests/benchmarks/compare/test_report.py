"""The report says what the rows say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import compare
from benchmarks.lib.compare import pictures, summary
from benchmarks.lib.compare.report import draw
from benchmarks.lib.compare.training import COLUMNS
from tests.benchmarks.compare.runs import RUN

# By clipping and learning rate, the accuracies of two seeds.
ENDS = {
    (0.0, 0.1): (0.80, 0.82),
    (0.0, 0.4): (0.10, 0.10),
    (0.04, 0.1): (0.70, 0.74),
    (0.04, 0.4): (0.90, 0.94),
}


def row(**given: Any) -> dict[str, Any]:
    shared = dict.fromkeys(COLUMNS, 1)
    described = {"backend": "torch", "device": "A CPU", "torch": "2.13", "version": "0.1"}
    losses = {"train_loss": 0.5, "test_loss": 0.5, "diverged": False}
    return {**shared, **described, **losses, **RUN._asdict(), **given}


@pytest.fixture
def rows() -> pd.DataFrame:
    found = []
    for batch in (64, 256):
        for (clipping, lr), ends in ENDS.items():
            for seed, accuracy in enumerate(ends):
                for epoch in (1, 2, 3):
                    found.append(
                        row(
                            **{"batch": batch, "clipping": clipping, "lr": lr, "seed": seed},
                            **{"epoch": epoch, "train_loss": 2 / epoch, "seconds": 1 + seed},
                            test_accuracy=accuracy * epoch / 3,
                            diverged=accuracy * epoch / 3 < 0.2,
                        )
                    )
    return pd.DataFrame(found)[COLUMNS]


def test_means_spreads_and_divergence_are_of_the_last_epochs(rows: pd.DataFrame) -> None:
    table = summary.by_lr(summary.finished(rows)).set_index(["batch", "clipping", "lr"])
    for batch in (64, 256):
        for key, (first, second) in ENDS.items():
            found: Any = table.loc[(batch, *key), :]
            assert found["mean"] == pytest.approx((first + second) / 2)
            assert found["std"] == pytest.approx(abs(first - second) / math.sqrt(2))
            assert (found["seeds"], found["diverged"]) == (2, 2 * (first == 0.1))


def test_each_case_has_its_best_learning_rate(rows: pd.DataFrame) -> None:
    best = summary.best(summary.by_lr(summary.finished(rows)))
    assert best.set_index(["batch", "clipping"])["lr"].to_dict() == {
        (64, 0.0): 0.1,
        (64, 0.04): 0.4,
        (256, 0.0): 0.1,
        (256, 0.04): 0.4,
    }


def test_runs_that_are_not_over_are_left_out(rows: pd.DataFrame) -> None:
    going_on = (rows["seed"] == 1) & (rows["epoch"] == 3)
    last = summary.finished(rows[~going_on])
    assert set(last["seed"]) == {0}
    stopped = row(epoch=2, train_loss=math.nan, seed=7)
    last = summary.finished(pd.concat([rows, pd.DataFrame([stopped])], ignore_index=True))
    assert 7 in set(last["seed"])
    with pytest.raises(summary.NoRows, match="no run is over"):
        summary.finished(rows[rows["epoch"] == 1])


def test_the_table_has_a_column_per_clipping(rows: pd.DataFrame) -> None:
    text = summary.markdown(summary.by_lr(summary.finished(rows)))
    assert "## cnn on digits, 160 images, 3 epochs, float32" in text.splitlines()
    assert "| optimizer | batch | no AGC | AGC 0.04 |" in text
    cells = "81.0 ± 1.4 (lr 0.1); 2 of 4 | 92.0 ± 2.8 (lr 0.4); 0 of 4"
    assert f"| sgd | 64 | {cells} |" in text
    assert f"| sgd | 256 | {cells} |" in text


def test_one_seed_has_no_spread(rows: pd.DataFrame) -> None:
    text = summary.markdown(summary.by_lr(summary.finished(rows[rows["seed"] == 0])))
    assert "| sgd | 64 | 80.0 (lr 0.1); 1 of 2 | 90.0 (lr 0.4); 0 of 2 |" in text


def test_pictures_show_the_numbers(rows: pd.DataFrame) -> None:
    rates = summary.by_lr(summary.finished(rows))
    figures = draw(rows, rates, "a title")
    assert list(figures) == ["accuracy-by-lr", "accuracy-by-batch", "loss", "time"]
    by_lr = figures["accuracy-by-lr"].axes
    assert [ax.get_title() for ax in by_lr] == ["sgd, batch size 64", "sgd, batch size 256"]
    errorbars: Any = by_lr[0].containers[0]
    unclipped = errorbars.lines[0]
    assert unclipped.get_xdata() == pytest.approx([0.1, 0.4])
    assert unclipped.get_ydata() == pytest.approx([0.81, 0.10])
    loss: Any = figures["loss"].axes[0].lines[0]
    assert list(loss.get_ydata()) == pytest.approx([2, 1, 2 / 3])
    bar: Any = figures["time"].axes[0].patches[0]
    assert bar.get_height() == pytest.approx(1.5)
    for figure in figures.values():
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["no AGC", "AGC 0.04"]


def test_losses_that_are_not_finite_leave_a_gap(rows: pd.DataFrame) -> None:
    broken = (rows["clipping"] == 0.04) & (rows["epoch"] >= 2)
    rows.loc[broken, "train_loss"] = math.nan
    figures = draw(rows, summary.by_lr(summary.finished(rows)), "a title")
    clipped: Any = figures["loss"].axes[0].lines[1]
    assert math.isnan(clipped.get_ydata()[1])


def test_optimizers_keep_their_order() -> None:
    names = pd.Series(["rmsprop", "adam", "sgd", "adam"])
    assert pictures.in_order(names) == ["sgd", "adam", "rmsprop"]


def test_the_report_is_written(
    tmp_path: Path, rows: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, part in rows.groupby("seed"):
        part.to_csv(tmp_path / f"{seed}.csv", index=False)
    files = [str(tmp_path / f"{seed}.csv") for seed in (0, 1, 1)]
    out = tmp_path / "report"
    compare.main(["report", *files, "--out", str(out)])
    text = (out / "comparison.md").read_text()
    assert summary.markdown(summary.by_lr(summary.finished(rows))) in text
    assert "On A CPU, 1 thread a run, torch 2.13, agc_triton 0.1." in text
    pictures_in = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures_in) == 4
    for name in pictures_in:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert str(out / "comparison.md") in capsys.readouterr().out


def test_what_is_no_comparison_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for path, message in {
        tmp_path / "absent.csv": "absent.csv is no file: python -m benchmarks.compare --out",
        other: "other.csv has not the columns",
    }.items():
        with pytest.raises(SystemExit):
            compare.main(["report", str(path), "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
