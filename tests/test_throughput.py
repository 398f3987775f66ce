"""Throughput reports hold what their columns say and lose nothing; nothing here is timed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import Parameter

from agc_triton import AdamW_AGC, unitwise_norm
from benchmarks import plots, readme_table, shapes, throughput
from benchmarks.providers import OPTIMIZERS, copy_provider, minimal_bytes, providers
from benchmarks.runner import COLUMNS, Rounds, count_launches, measure
from tests.helpers import SHAPES, write_shapes

CPU = torch.device("cpu")
ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES)


@pytest.fixture(autouse=True)
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One small model, no GPU, and the thread count as it was afterwards."""
    threads = torch.get_num_threads()
    tables = tmp_path / "shapes"
    tables.mkdir()
    write_shapes(tables / "tiny.csv", SHAPES)
    monkeypatch.setattr(shapes, "TABLES", tables)
    monkeypatch.setattr(throughput, "MODEL", "tiny")
    yield
    torch.set_num_threads(threads)


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
    throughput.main(["--device", "cpu", "--out", str(out), "--threads", "1"])
    table = pd.read_csv(out)
    assert list(table.columns) == COLUMNS
    expected = [
        (optimizer, str(dtype).removeprefix("torch."), p.implementation)
        for dtype in (torch.float32, torch.bfloat16)
        for optimizer in OPTIMIZERS
        for p in [*providers(optimizer, "cpu", dtype), copy_provider(optimizer)]
    ]
    found = zip(table["optimizer"], table["dtype"], table["implementation"], strict=True)
    assert list(found) == expected
    assert set(table["parameters"]) == {ELEMENTS}
    assert set(table["units"]) == {sum(unitwise_norm(torch.ones(s)).numel() for s in SHAPES)}
    assert set(table["threads"]) == {1}
    assert table["launches"].isna().all()
    assert (table["host_ms"] == table["median_ms"]).all()
    for _, rows in table.groupby(["optimizer", "dtype"]):
        copied = rows[rows["role"] == "copy"].iloc[0]
        assert list(rows["bytes_moved"].unique()) == [copied["bytes_moved"]]
        share = rows["gb_per_s"] / copied["gb_per_s"]
        pd.testing.assert_series_equal(rows["share_of_copy_bandwidth"], share, check_names=False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_count_the_states_that_torch_keeps(optimizer: str) -> None:
    param = Parameter(torch.ones(5, 3))
    param.grad = torch.ones(5, 3)
    base = OPTIMIZERS[optimizer].torch_class([param], **OPTIMIZERS[optimizer].options)
    base.step()
    states = [s for s in base.state[param].values() if s.shape == param.shape]
    loads, stores = 2 + len(states), 1 + len(states)
    assert minimal_bytes(optimizer, [param]) == 4 * 15 * (loads + stores)


def test_the_copy_moves_as_many_bytes() -> None:
    params = [torch.zeros(5, 3), torch.zeros(2)]
    copied: Any = copy_provider("adamw").build(params)()
    assert 2 * copied.nbytes == minimal_bytes("adamw", params)
    assert copied.all()


def test_16_bit_sgd_is_not_compared_with_a_kernel_that_is_wrong() -> None:
    names = [p.implementation for p in providers("sgd", "cpu", torch.bfloat16)]
    assert not any("fused" in name for name in names)
    assert any("fused" in p.implementation for p in providers("sgd", "cuda", torch.bfloat16))


def test_launches_are_those_of_the_plan() -> None:
    param = Parameter(torch.ones(2, 3))
    param.grad = torch.ones(2, 3)
    planned = AdamW_AGC([param], backend="triton")
    if os.environ.get("TRITON_INTERPRET") == "1":  # without a GPU
        assert count_launches(planned.step, CPU) == 2
    assert count_launches(AdamW_AGC([param], backend="torch").step, CPU) is None


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


def test_what_does_not_fit_in_memory_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(optimizer: str, *args: Any) -> pd.DataFrame:
        if optimizer == "sgd":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(optimizer, *args)

    monkeypatch.setattr(throughput, "measure", too_large)
    assert set(run(tmp_path / "rows.csv")["optimizer"]) == {"adamw"}
    assert "tiny sgd fp32 does not fit and is left out: CUDA out" in capsys.readouterr().out


def test_without_resume_the_rows_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    run(out, "--optimizers", "sgd")
    assert set(run(out, "--optimizers", "adamw")["optimizer"]) == {"adamw"}


def test_a_failed_write_leaves_the_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    before = pd.DataFrame({"a": [1]})
    throughput.write(before, out)

    def half_written(_: pd.DataFrame, path: Path, **_options: Any) -> None:
        Path(path).write_text("a\n")
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half_written)
    with pytest.raises(OSError, match="No space"):
        throughput.write(before, out)
    pd.testing.assert_frame_equal(pd.read_csv(out), before)


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


def test_readme_has_the_committed_figures() -> None:
    text = readme_table.README.read_text()
    assert list(readme_table.RESULTS.glob("throughput-*.csv"))
    assert readme_table.with_tables(text) == text


def test_readme_table_by_implementation_and_optimizer() -> None:
    common = {"model": readme_table.MODEL, "dtype": readme_table.DTYPE, "parameters": 71_489_284}
    machine = {"device": "Some CPU", "threads": 2, "torch": "9.9"}
    rows = [
        {"implementation": "x", "optimizer": "sgd", "median_ms": 123.4, "ratio_to_unclipped": 2.0},
        {"implementation": "x", "optimizer": "adamw", "median_ms": 9.87, "ratio_to_unclipped": 1.0},
        {"implementation": "y", "optimizer": "sgd", "median_ms": 1, "ratio_to_unclipped": 0.5},
    ]
    table = pd.DataFrame([{**common, **machine, **row} for row in rows])
    other = table.assign(dtype="bfloat16", median_ms=0)
    assert readme_table.markdown(pd.concat([other, table])).splitlines() == [
        "dm_nfnet_f0, float32, 71.5 million parameters on Some CPU, 2 threads, torch 9.9:",
        "",
        "| ms per step (times unclipped) | SGD | Adam | AdamW | RMSprop |",
        "|---|---|---|---|---|",
        "| x | 123 (2.00) |  | 9.87 (1.00) |  |",
        "| y | 1 (0.50) |  |  |  |",
    ]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_measured_on_a_gpu() -> None:
    workload = shapes.on_device(shapes.random_workload("tiny"), torch.device("cuda"))
    compared = [p for p in providers("adamw", "cuda") if p.quick]
    rows = measure("adamw", [*compared, copy_provider("adamw")], workload, Rounds(1, 2))
    assert rows["launches"].notna().all()
    assert (rows["median_ms"] > 0).all()
    assert set(rows["device"]) == {torch.cuda.get_device_name()}


def test_host_cost_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"implementation": name, "kind": kind, "tensors": n, "groups": groups, "median_us": n}
        for name in ("ours", "theirs")
        for kind in ("steady", "changing")
        for n, groups in ((30, 1), (600, 1), (600, 10))
    ]
    path = plots.host_cost(pd.DataFrame(rows).assign(device="Some CPU"), tmp_path / "cost.csv")
    assert path == tmp_path / "cost.png"
    assert path.read_bytes().startswith(b"\x89PNG")
