"""Command lines are checked before anything is measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    compare,
    digits,
    host_cost,
    kernel_report,
    scaling,
    throughput,
    training,
    tune_blocks,
)

REPORTS: list[Any] = [
    *(compare, digits, host_cost, kernel_report, scaling, throughput, training, tune_blocks),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.__name__)
def test_where_rows_go_is_checked_before_anything_is_measured(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    under_a_file = tmp_path / "file" / "rows.csv"
    read_only = tmp_path / "new" / "rows.csv"
    monkeypatch.setattr(os, "access", lambda path, mode: path == read_only and mode != os.W_OK)
    places = {under_a_file: "argument --out: [Errno", read_only: "cannot be written to"}
    if report is not digits:  # which writes to a folder
        places[tmp_path] = f"argument --out: {tmp_path} is a folder"
    for out, message in places.items():
        with pytest.raises(SystemExit):
            report.main(["--out", str(out)])
        assert message in capsys.readouterr().err
    assert read_only.parent.is_dir()


@pytest.mark.parametrize(
    ("report", "arguments", "message"),
    [
        (throughput, "--threads 0", "--threads: 0 is no whole number above 0"),
        (throughput, "--threads two", "--threads: two is no whole number above 0"),
        (throughput, "--device cuda", "--device: torch finds no GPU"),
        (scaling, "--device cuda", "--device: torch finds no GPU"),
        (scaling, "--max-elements nan", "--max-elements: nan is no number from 10,000 on"),
        (scaling, "--max-elements inf", "--max-elements: inf is no number from 10,000 on"),
        (scaling, "--max-elements many", "--max-elements: invalid elements value: 'many'"),
        (training, "--batches 64 0", "--batches: 0 is no whole number above 0"),
        (
            training,
            "--models no_such",
            "--models: no_such is no model of timm's, if there is timm",
        ),
        (digits, "--device cuda", "--device: torch finds no GPU"),
        (digits, "--epochs 0", "--epochs: 0 is no whole number above 0"),
        (digits, "--seeds -1", "--seeds: -1 is no whole number above 0"),
        (compare, "--device cuda", "--device: torch finds no GPU"),
        (compare, "--jobs 0", "--jobs: 0 is no whole number above 0"),
        (compare, "--data imagenet", "--data: imagenet is none of digits, mnist"),
        (compare, "--models no_such", "--models: no_such is no model of timm's, if there is timm"),
        (compare, "--batches 2000", "--batches: 2000 is more than the 1,437 images of digits"),
        (compare, "--lrs -1", "--lrs: -1.0 is no learning rate"),
        (compare, "--clippings nan", "--clippings: nan is no clipping"),
        (kernel_report, "--arch 91x", "--arch: invalid choice: '91x' (choose from"),
        (host_cost, "--calls 0", "--calls: 0 is no whole number above 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    report: Any,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        report.main([*arguments.split(), "--out", str(tmp_path / "rows.csv")])
    assert f"error: argument {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
