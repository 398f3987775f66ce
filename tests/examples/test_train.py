"""examples/train.py learns, and goes on to the same bits wherever it was killed."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from examples import train as example
from tests.benchmarks.data_files import random_images, write_idx
from tests.support.optimizers import EACH_WAY
from tests.support.ranks import apart, on_ranks
from tests.support.soak import soaked
from tests.support.tensors import same

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = ["--images", "96", "--pixels", "8", "--batch", "32", "--epochs", "3", "--every", "2"]
TIMES = ["seconds", "images_per_s"]


def trained(arguments: list[str], _rank: int = 0) -> dict[str, Any]:
    """The weights at the end."""
    net = example.train(example.arguments(arguments), CPU).net
    return {name: value.detach() for name, value in net.state_dict().items()}


def killed(saves: int, arguments: list[str], _rank: int = 0) -> None:
    """Train, and die when so many checkpoints have been written."""
    written = itertools.count(1)

    class Killed(example.Training):
        def save(self) -> None:
            super().save()
            if next(written) == saves and self.rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    example.Training = Killed  # type: ignore[misc]  # this process is for it alone
    trained(arguments)


def left_in(out: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The checkpoint and the table, without times."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    for part in (*state["rows"], *state["ranks"]):
        for key in TIMES:
            part.pop(key, None)
    return state, pd.read_csv(out / "epochs.csv").drop(columns=TIMES)


def assert_alike(out: Path, other: Path) -> None:
    """Weights, average, states of optimizer, schedule and scaler, random numbers, rows."""
    (state, table), (expected, rows) = left_in(out), left_in(other)
    assert {"net", "ema", "optimizer", "scheduler", "scaler", "ranks", "rows"} <= state.keys()
    assert same(state, expected)
    pd.testing.assert_frame_equal(table, rows, check_exact=True)
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["clipped"].between(0, 1).all()
    for epoch in table["epoch"]:  # but for the steps that each process has counted
        clips, others = (
            pd.read_csv(folder / f"clipping-{epoch}.csv").drop(columns="step")
            for folder in (out, other)
        )
        pd.testing.assert_frame_equal(clips, others, check_exact=True)
        assert set(state["net"]) | {"total"} == set(clips["name"])


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps made in this process, by their place in the epoch."""
    made: list[int] = []
    update = example.Training.update

    def counted(self: example.Training, parts: Iterator[Any]) -> None:
        made.append(self.step)
        update(self, parts)

    monkeypatch.setattr(example.Training, "update", counted)
    return made


def test_it_is_killed_and_goes_on_to_the_same_bits(tmp_path: Path, updates: list[int]) -> None:
    # Whose fp16 is quick on a CPU.
    given = [*SMALL, "--model", "cnn", "--amp", "fp16", "--accumulate", "2", "--out"]
    trained([*given, str(tmp_path / "whole")])
    assert updates == [0, 1, 2] * 3
    cut = [*given, str(tmp_path / "cut")]
    assert apart(killed, 3, cut) == -signal.SIGKILL
    updates.clear()
    # How images are decoded is no matter to the numbers.
    trained([*cut, "--workers", "1"])
    assert updates == [2, 0, 1, 2]
    assert_alike(tmp_path / "cut", tmp_path / "whole")


def test_two_ranks_are_killed_and_go_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(work: Any, name: str, folder: str) -> list[Any]:
        (tmp_path / folder).mkdir()
        given = [*SMALL, "--optimizer", "AdamW_AGC", "--amp", "bf16", "--accumulate", "2"]
        return on_ranks(partial(work, [*given, "--out", str(tmp_path / name)]), tmp_path / folder)

    first, second = run(trained, "whole", "1")
    assert same(first, second)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run(partial(killed, 3), "cut", "2")
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    run(trained, "cut", "3")
    assert_alike(tmp_path / "cut", tmp_path / "whole")


def test_parts_and_ranks_share_a_batch(tmp_path: Path) -> None:
    # Images that are too small to be cropped, so that all see the same.
    given = [*SMALL, "--pixels", "4", "--epochs", "1", "--out"]
    whole = trained([*given, str(tmp_path / "whole")])
    parts = trained([*given, str(tmp_path / "parts"), "--accumulate", "4"])
    ranks = on_ranks(partial(trained, [*given, str(tmp_path / "ranks")]), tmp_path)
    for other in (parts, *ranks):
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value)
    _, rows = left_in(tmp_path / "whole")
    for other in ("parts", "ranks"):
        pd.testing.assert_frame_equal(left_in(tmp_path / other)[1], rows)


class Board:
    """What is written for TensorBoard."""

    written: ClassVar[list[tuple[str, int]]] = []
    begun: ClassVar[list[tuple[Path, int]]] = []

    def __init__(self, folder: Path, purge_step: int) -> None:
        self.begun.append((folder, purge_step))

    def add_scalar(self, name: str, number: float, step: int) -> None:
        assert math.isfinite(number)
        self.written.append((name, step))


def test_tensorboard_gets_numbers_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "find_spec", lambda name: name == "tensorboard")
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board)
    )
    trained([*SMALL, "--out", str(tmp_path)])
    assert [step for name, step in Board.written if name == "loss"] == [1, 3, 4, 6, 7, 9]
    assert {"loss", "lr", "clipped", "removed"} <= {name for name, _ in Board.written}
    trained([*SMALL, "--out", str(tmp_path)])
    assert Board.begun == [(tmp_path, 0), (tmp_path, 9)]


@pytest.mark.parametrize(
    ("name", "lr"),
    soaked(
        [("SGD_AGC", "4"), ("Adam_AGC", "0.2"), ("AdamW_AGC", "0.2"), ("RMSprop_AGC", "0.05")],
        lambda name, lr: name in ("SGD_AGC", "AdamW_AGC"),
    ),
)
def test_it_learns(name: str, lr: str, tmp_path: Path) -> None:
    given = ["--images", "512", "--pixels", "8", "--batch", "64", "--epochs", "4", "--lr", lr]
    given += ["--clipping", "0.08", "--ema", "0.9", "--optimizer", name, "--out", str(tmp_path)]
    rows = example.train(example.arguments(given), CPU).rows
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[-1]["ema_test_accuracy"] > 0.6
    assert rows[-1]["lr"] == 0


@pytest.mark.parametrize(
    "name", soaked(example.OURS, lambda name: name.removesuffix("_AGC") in EACH_WAY)
)
def test_every_optimizer_goes_by_its_name(name: str, tmp_path: Path) -> None:
    given = [*SMALL, "--images", "32", "--epochs", "1", "--optimizer", name]
    given += ["--out", str(tmp_path)]
    training = example.train(example.arguments(given), CPU)
    assert type(training.optimizer).__name__ == name
    assert training.optimizer.state


def test_it_reads_data_in_a_folder(tmp_path: Path) -> None:
    write_idx(tmp_path, random_images(64, 1, 8, 10), random_images(20, 1, 8, 10, seed=1), False)
    given = ["--data", f"mnist={tmp_path}", "--batch", "32", "--epochs", "1"]
    trained([*given, "--out", str(tmp_path / "out"), "--model", "nf_resnet"])
    assert len(pd.read_csv(tmp_path / "out" / "epochs.csv")) == 1


def test_what_cannot_be_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL, "--epochs", "1", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match=r"--batch 32 has to be a multiple of 1 ranks times .* 3"):
        trained([*given, "--accumulate", "3"])
    with pytest.raises(ValueError, match=r"--batch 128 .* at most 96"):
        trained([*given, "--batch", "128"])
    with pytest.raises(SystemExit):
        trained([*given, "--model", "no_such"])
    assert "no_such is no model" in capsys.readouterr().err
    trained(given)
    with pytest.raises(ValueError, match=r"of a run with lr=0\.1, seed=0: give another --out"):
        trained([*given, "--seed", "3", "--lr", "2"])


@pytest.mark.soak
def test_torchrun_and_compile(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "examples.train", *SMALL, "--compile", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert len(rows) == len(pd.read_csv(tmp_path / "epochs.csv")) == 3
