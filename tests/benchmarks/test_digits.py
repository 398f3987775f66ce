"""The digits demo trains what it says it trains; accuracies are its output, not tested here."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import digits
from benchmarks.lib.nfnet import NFNet

COLUMNS = [
    *("optimizer", "lr", "clipping", "seed", "epoch", "train_loss", "test_loss", "test_accuracy"),
    *("clipped", "seconds", "backend", "diverged", "batch", "torch", "device", "threads"),
]

# Of a row, what is another in each run, and what torch's optimizer has none of.
PASSING = ("seconds", "clipped")


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load_split(torch.device("cpu"))


def curves(
    data: digits.Digits, name: str, lr: float, epochs: int, seed: int = 0
) -> list[dict[str, Any]]:
    rows = digits.train(name, lr, seed, epochs, data)
    return [{key: value for key, value in row.items() if key not in PASSING} for row in rows]


def test_only_the_head_is_not_clipped() -> None:
    net = NFNet(10)
    groups = digits.build_optimizer("SGD_AGC", net, lr=0.1).param_groups
    clipping = {p: group["clipping"] for group in groups for p in group["params"]}
    head = set(net.head.parameters())
    assert clipping == {p: 0 if p in head else digits.CLIPPING for p in net.parameters()}


def test_all_images_are_used_and_standardized(data: digits.Digits) -> None:
    assert len(data.train_images) == len(data.train_labels) == 1437
    assert len(data.test_images) == len(data.test_labels) == 360
    assert data.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_images.std().item() == pytest.approx(1, abs=1e-3)


def test_clipping_is_the_only_difference(
    data: digits.Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = curves(data, "SGD", 0.8, epochs=2)
    assert curves(data, "SGD_AGC", 0.8, epochs=2) != plain
    monkeypatch.setattr(digits, "CLIPPING", 0.0)
    assert curves(data, "SGD_AGC", 0.8, epochs=2) == plain


def test_a_run_ends_where_its_loss_is_not_finite(data: digits.Digits) -> None:
    rows = pd.DataFrame(curves(data, "SGD", 1e6, epochs=9))
    finite = (rows["train_loss"] + rows["test_loss"]).map(math.isfinite)
    assert finite.tolist() == [True] * (len(rows) - 1) + [False]
    assert digits.run_is_broken(rows)


@pytest.mark.parametrize(
    ("train_loss", "test_loss", "test_accuracy", "broken"),
    [
        (0.1, 0.1, 0.95, False),
        (2.3, 2.3, 0.2, False),
        (2.3, 2.3, 0.19, True),
        (math.nan, 0.1, 0.95, True),
        (0.1, math.inf, 0.95, True),
    ],
)
def test_what_counts_as_broken(
    train_loss: float, test_loss: float, test_accuracy: float, broken: bool
) -> None:
    last = {"train_loss": train_loss, "test_loss": test_loss, "test_accuracy": test_accuracy}
    first = {"train_loss": 2.3, "test_loss": 2.3, "test_accuracy": 0.1}
    assert digits.run_is_broken(pd.DataFrame([first, last])) is broken


def summary(sgd_broken: int) -> pd.DataFrame:
    """Two learning rates, three runs each; SGD breaks at the second."""
    index = pd.MultiIndex.from_product([(0.5, 2.0), ("SGD", "SGD_AGC")], names=["lr", "optimizer"])
    return pd.DataFrame(
        {
            "median_test_accuracy": [0.9, 0.8, 0.1, 0.95],
            "runs": 3,
            "broken_runs": [0, 0, sgd_broken, 0],
        },
        index=index,
    )


def test_verdict_says_what_broke_and_what_did_not() -> None:
    assert digits.verdict(summary(sgd_broken=2)) == (
        "Runs that broke at lr 2: 2 of 3 with SGD, 0 of 3 with SGD_AGC."
        " Best median test accuracy: 90.0% (lr 0.5) with SGD, 95.0% (lr 2) with SGD_AGC."
        " At lr 0.5, where none broke: 90.0% with SGD, 80.0% with SGD_AGC."
    )
    assert digits.verdict(summary(sgd_broken=0)).startswith("No run broke")


def test_csv_has_every_epoch_and_the_picture_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits.main(["--seeds", "2", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "digits.csv")
    assert rows.columns.tolist() == COLUMNS
    runs = rows[["lr", "seed", "optimizer", "epoch"]].itertuples(index=False, name=None)
    assert list(runs) == list(itertools.product(digits.LRS, (0, 1), digits.COLORS, (1,)))
    assert rows[["seconds", "torch", "device"]].notna().all(axis=None)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert set(rows["backend"]) == {"torch"}
    assert rows["clipped"].between(0, 1, inclusive="right").tolist() == [
        name == "SGD_AGC" for name in rows["optimizer"]
    ]
    printed = capsys.readouterr().out
    assert str(tmp_path / "digits.csv") in printed
    assert "SGD's steps by torch, SGD_AGC's steps by torch." in printed
