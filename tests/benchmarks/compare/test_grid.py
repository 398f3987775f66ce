"""A grid is every combination, once, with the settings that were given."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.lib.compare.grid import GRIDS, MIDDLE_LR, Part, Run, all_runs, default_lrs
from benchmarks.lib.compare.training import Where
from benchmarks.lib.networks import is_known
from benchmarks.lib.optimizers import OPTIMIZERS


def runs(*arguments: str) -> list[Run]:
    return compare.runs_of(compare.make_parser().parse_args(arguments))


def test_every_combination_is_there_once() -> None:
    found = runs(
        *("--data", "digits", "mnist=/there", "--models", "cnn", "nf_resnet", "--seeds", "2"),
        *("--optimizers", "sgd", "adam", "--clippings", "0", "0.01", "--batches", "64", "128"),
        *("--lrs", "0.1", "0.2", "--epochs", "5", "--images", "99", "--pixels", "20"),
        *("--dtype", "bfloat16"),
    )
    axes: tuple[tuple[Any, ...], ...] = (
        *(("digits", "mnist"), (20,), (99,), ("cnn", "nf_resnet"), ("sgd", "adam"), (0.0, 0.01)),
        *((64, 128), (0.1, 0.2), (0, 1), (5,), ("bfloat16",)),
    )
    assert Counter(found) == Counter(Run(*run) for run in itertools.product(*axes))


def test_a_grid_that_is_cut_short_has_every_run_with_the_first_seed() -> None:
    assert [run.seed for run in runs("--seeds", "3")] == [0] * 27 + [1] * 27 + [2] * 27


@pytest.mark.parametrize(("jobs", "threads"), [(1, 8), (3, 2), (9, 1)])
def test_jobs_share_the_cores(
    jobs: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Where] = []

    def nothing(tasks: object, jobs: int, where: Where) -> tuple[()]:
        asked.append(where)
        return ()

    monkeypatch.setattr(compare, "cores", lambda: 8)
    monkeypatch.setattr(compare, "perform_all", nothing)
    compare.main(["--jobs", str(jobs), "--device", "cpu", "--out", str(tmp_path / "rows.csv")])
    assert [where.threads for where in asked] == [threads]


def test_parts_that_overlap_are_made_once() -> None:
    part = Part(lrs=(0.1,), seeds=2)
    assert len(all_runs([part, part, Part(lrs=(0.1, 0.2), seeds=1)])) == 9 * 2 + 9


def test_learning_rates_go_with_the_square_root_of_the_batch() -> None:
    assert default_lrs("sgd", 256) == (0.1, 0.4, 1.6)
    assert default_lrs("sgd", 4096) == (0.4, 1.6, 6.4)
    assert default_lrs("adam", 64) == (0.0005, 0.002, 0.008)


def test_optimizers_of_no_grid_start_from_torchs_learning_rate() -> None:
    assert MIDDLE_LR["adadelta"] == 1.0
    assert default_lrs("radam", 256) == (0.00025, 0.001, 0.004)
    assert {run.optimizer for run in runs("--optimizers", *MIDDLE_LR)} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", GRIDS)
def test_the_grids_with_names_are_of_what_is_there(name: str) -> None:
    found = all_runs(GRIDS[name])
    assert all(is_known(run.model) and run.optimizer in MIDDLE_LR for run in found)
    cases = {run._replace(clipping=0.0) for run in found}
    assert cases <= set(found), "each has its counterpart without clipping"
