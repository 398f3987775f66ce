"""Throughput reports hold what their columns say and lose nothing; nothing here is timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from agc_triton import unitwise_norm
from benchmarks import throughput
from benchmarks.lib import memory_limits, workloads
from benchmarks.lib.copying import copy_provider
from benchmarks.lib.measure import measure
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.patience import Patience
from benchmarks.lib.providers import providers
from benchmarks.lib.rows import COLUMNS
from tests.benchmarks.tiny import ELEMENTS, SHAPES

pytestmark = pytest.mark.usefixtures("tiny_model")


# With options of their own and none, with torch's fused kernel and none, states from the start.
SOME = ("sgd", "adamw", "adagrad", "rprop")


def run(out: Path, *arguments: str) -> pd.DataFrame:
    throughput.main(["--quick", "--device", "cpu", "--out", str(out), *arguments])
    return pd.read_csv(out)


class Measured:
    """`measure`, with a list of what it was asked for; it can be interrupted before a call."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.optimizers: list[str] = []
        self.interrupt_at = interrupt_at

    def __call__(self, optimizer: str, *args: Any) -> pd.DataFrame:
        if len(self.optimizers) == self.interrupt_at:
            raise KeyboardInterrupt
        self.optimizers.append(optimizer)
        return measure(optimizer, *args)


def test_a_row_per_implementation_with_every_column(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.csv"
    arguments = ["--device", "cpu", "--out", str(out), "--threads", "1", "--optimizers"]
    throughput.main([*arguments, *SOME])
    table = pd.read_csv(out)
    assert list(table.columns) == COLUMNS
    expected = [
        (optimizer, str(dtype).removeprefix("torch."), p.implementation)
        for dtype in (torch.float32, torch.bfloat16)
        for optimizer in SOME
        for p in [*providers(optimizer, "cpu", dtype), copy_provider(optimizer)]
    ]
    found = zip(table["optimizer"], table["dtype"], table["implementation"], strict=True)
    assert list(found) == expected
    assert set(table["parameters"]) == {ELEMENTS}
    assert set(table["units"]) == {sum(unitwise_norm(torch.ones(s)).numel() for s in SHAPES)}
    assert set(table["threads"]) == {1}
    options = dict(zip(table["optimizer"], table["options"], strict=True))
    assert options == {
        "sgd": "lr=1e-09, momentum=0.9",
        "adamw": "lr=1e-09",
        "adagrad": "lr=1e-09",
        "rprop": "lr=1e-09, step_sizes=(0.0, 1e-09)",
    }
    assert table["launches"].isna().all()
    assert (table["host_ms"] == table["device_ms"]).all()
    for _, rows in table.groupby(["optimizer", "dtype"]):
        copied = rows[rows["role"] == "copy"].iloc[0]
        assert list(rows["bytes_moved"].unique()) == [copied["bytes_moved"]]
        share = rows["gb_per_s"] / copied["gb_per_s"]
        pd.testing.assert_series_equal(rows["share_of_copy_bandwidth"], share, check_names=False)


def test_all_optimizers_are_measured_where_none_is_named() -> None:
    assert throughput.parse(["--device", "cpu"]).optimizers == [*OPTIMIZERS]


def test_a_short_run_compiles_both_algorithms_where_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda step: step)
    found = run(tmp_path / "rows.csv", "--compile", "--optimizers", "sgd")["implementation"]
    compiled = [f"{name} AGC, torch.optim, torch.compile" for name in ("timm", "agc_optims")]
    assert found[found.str.contains("torch.compile")].tolist() == compiled
    plain = run(tmp_path / "rows.csv", "--optimizers", "sgd")["implementation"]
    assert plain.tolist() == [name for name in found if name not in compiled]


def test_resume_keeps_rows_and_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    first = run(out, "--optimizers", "adamw")
    measured = Measured()
    monkeypatch.setattr(throughput, "measure", measured)
    both = run(out, "--resume")
    assert measured.optimizers == ["sgd"]
    pd.testing.assert_frame_equal(both.iloc[: len(first)], first)
    again = run(out, "--resume")
    assert measured.optimizers == ["sgd"]
    pd.testing.assert_frame_equal(again, both)


@pytest.mark.parametrize("column", ["version", "torch", "triton"])
def test_resume_keeps_no_rows_of_other_versions(
    column: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.csv"
    table = run(out)
    table.loc[table["optimizer"].eq("adamw") & table["role"].eq("ours"), column] = "9.9"
    table.to_csv(out, index=False)
    monkeypatch.setattr(throughput, "measure", measured := Measured())
    again = run(out, "--resume")
    assert measured.optimizers == ["adamw"]
    assert "9.9" not in set(again[column].astype(str))
    assert len(again) == len(table)
    assert f"groups kept as they were in {out}: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is no table: No columns"), ("a,b\n1,2\n", "has no columns alone_ms, ")],
)
def test_resume_from_what_is_no_report_says_so(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    out.write_text(content)
    with pytest.raises(SystemExit):
        run(out, "--resume")
    assert f"argument --resume: {out} {message}" in capsys.readouterr().err
    assert out.read_text() == content


def test_resume_measures_a_group_anew_where_implementations_are_missing(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    few = run(out, "--optimizers", "adamw")
    arguments = ["--device", "cpu", "--resume", "--optimizers", "adamw", "--dtypes", "fp32"]
    throughput.main([*arguments, "--out", str(out)])
    table = pd.read_csv(out)
    assert len(table) > len(few)
    assert not table.duplicated(["optimizer", "implementation"]).any()
    assert set(table["rounds"]) == {12}


def test_a_killed_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    monkeypatch.setattr(throughput, "measure", Measured(interrupt_at=1))
    with pytest.raises(KeyboardInterrupt):
        run(out)
    kept = pd.read_csv(out)
    assert set(kept["optimizer"]) == {"sgd"}
    monkeypatch.setattr(throughput, "measure", rest := Measured())
    table = run(out, "--resume")
    assert rest.optimizers == ["adamw"]
    pd.testing.assert_frame_equal(table.iloc[: len(kept)], kept)


def test_what_memory_has_no_room_for_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = Measured()
    monkeypatch.setattr(throughput, "measure", measured)
    sgd, adamw = (quick_bytes(optimizer) for optimizer in ("sgd", "adamw"))
    assert sgd < adamw
    monkeypatch.setattr(memory_limits, "free_bytes", lambda _: sgd / memory_limits.USABLE)
    assert set(run(tmp_path / "rows.csv")["optimizer"]) == {"sgd"}
    assert measured.optimizers == ["sgd"]
    assert "tiny adamw fp32 is left out: it needs 0.0 GiB, over 90%" in capsys.readouterr().out


def quick_bytes(optimizer: str) -> int:
    compared = [*(p for p in providers(optimizer) if p.quick), copy_provider(optimizer)]
    return throughput.needed(throughput.Group("tiny", optimizer, "fp32"), compared, None)


def test_a_workload_that_is_there_is_not_counted_again() -> None:
    group = throughput.Group("tiny", "sgd", "bf16")
    workload = workloads.random_workload("tiny", torch.bfloat16)
    assert throughput.is_of(workload, group)
    difference = throughput.needed(group, [], None) - throughput.needed(group, [], workload)
    assert difference == 2 * 2 * ELEMENTS


def test_what_does_not_fit_on_a_gpu_after_all_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(optimizer: str, *args: Any) -> pd.DataFrame:
        if optimizer == "sgd":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(optimizer, *args)

    monkeypatch.setattr(throughput, "measure", too_large)
    assert set(run(tmp_path / "rows.csv")["optimizer"]) == {"adamw"}
    assert "tiny sgd fp32 is left out: CUDA out" in capsys.readouterr().out


def test_without_resume_the_rows_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    run(out, "--optimizers", "sgd")
    assert set(run(out, "--optimizers", "adamw")["optimizer"]) == {"adamw"}


def pictures(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("*.png"))


def test_plot_draws_one_picture_per_dtype(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "rows.csv", "--plot", "--dtypes", "fp32", "bf16")
    drawn = pictures(tmp_path)
    assert [path.stem.split("-")[-1] for path in drawn] == ["bfloat16", "float32"]
    printed = capsys.readouterr().out
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in printed


def test_what_follows_from_the_rows_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = run(tmp_path / "rows.csv")
    expected = [
        (optimizer, p.implementation)
        for optimizer in ("sgd", "adamw")
        for p in [*(p for p in providers(optimizer) if p.quick), copy_provider(optimizer)]
    ]
    assert list(zip(table["optimizer"], table["implementation"], strict=True)) == expected
    assert set(table["threads"]) == {throughput.THREADS}
    printed = capsys.readouterr().out
    for optimizer, rows in table.groupby("optimizer"):
        fastest = rows.groupby("role")["device_ms"].min()
        ours = rows[rows["role"] == "ours"].iloc[0]
        assert ours["ratio_to_best_peer"] == pytest.approx(fastest["peer"] / fastest["ours"])
        assert ours["ratio_to_unclipped"] == pytest.approx(fastest["ours"] / fastest["unclipped"])
        assert f"tiny {optimizer} float32: agc_triton, torch path takes" in printed
        assert f"{ours['ratio_to_best_peer']:.2f} times as fast as timm AGC" in printed


def test_what_took_too_long_to_compile_is_not_tried_again_on_resuming(tmp_path: Path) -> None:
    rows = run(tmp_path / "rows.csv", "--optimizers", "adamw")
    known = [p for p in providers("adamw") if p.quick]
    late = known[0]._replace(implementation="late", patience=Patience(1))
    assert throughput.is_measured(rows, [*known, late])
    assert not throughput.is_measured(rows, [*known, late._replace(patience=None)])
