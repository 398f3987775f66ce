"""Throughput reports hold what their columns say and lose nothing; nothing here is timed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn import Parameter
from torch.profiler import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

import agc_triton
from agc_triton import AdamW_AGC, unitwise_norm
from benchmarks import counters, memory, plots, readme_table, rotation, shapes, throughput
from benchmarks.counters import count_launches, launched
from benchmarks.providers import OPTIMIZERS, copy_provider, minimal_bytes, providers
from benchmarks.runner import COLUMNS, Rounds, measure, write
from benchmarks.timing import Step
from benchmarks.version import version_in
from tests.support.helpers import SHAPES, write_shapes

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
    options = dict(zip(table["optimizer"], table["options"], strict=True))
    momentum = dict.fromkeys(("sgd", "rmsprop"), "lr=1e-09, momentum=0.9")
    assert options == dict.fromkeys(OPTIMIZERS, "lr=1e-09") | momentum
    assert table["launches"].isna().all()
    assert (table["host_ms"] == table["median_ms"]).all()
    for _, rows in table.groupby(["optimizer", "dtype"]):
        copied = rows[rows["role"] == "copy"].iloc[0]
        assert list(rows["bytes_moved"].unique()) == [copied["bytes_moved"]]
        share = rows["gb_per_s"] / copied["gb_per_s"]
        pd.testing.assert_series_equal(rows["share_of_copy_bandwidth"], share, check_names=False)


def test_a_short_run_compiles_both_algorithms_where_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda step: step)
    found = run(tmp_path / "rows.csv", "--compile", "--optimizers", "sgd")["implementation"]
    compiled = [f"{name} AGC, torch.optim, torch.compile" for name in ("timm", "agc_optims")]
    assert found[found.str.contains("torch.compile")].tolist() == compiled
    plain = run(tmp_path / "rows.csv", "--optimizers", "sgd")["implementation"]
    assert plain.tolist() == [name for name in found if name not in compiled]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_count_the_states_that_torch_keeps(optimizer: str) -> None:
    param = Parameter(torch.ones(5, 3))
    param.grad = torch.ones(5, 3)
    base = OPTIMIZERS[optimizer].torch_class([param], **OPTIMIZERS[optimizer].options)
    base.step()
    states = [s for s in base.state[param].values() if s.shape == param.shape]
    loads, stores = 2 + len(states), 1 + len(states)
    assert minimal_bytes(optimizer, [param]) == 4 * 15 * (loads + stores)


@pytest.mark.parametrize("least", [0, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elements", [1, 17, 256])
def test_the_copy_moves_as_many_bytes_in_buffers_that_are_not_larger(
    elements: int, dtype: torch.dtype, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.providers.LEAST_COPIED", least)
    params = [torch.zeros(elements, dtype=dtype)]
    step = copy_provider("adamw").build(params)
    with Copied() as copied:
        step()
    moved = minimal_bytes("adamw", params)
    assert 2 * sum(to.nbytes for to, _ in copied.pairs) == moved
    assert all(to.nbytes % 8 == 0 for to, _ in copied.pairs[:-1])
    storages = [x.untyped_storage() for pair in copied.pairs for x in pair]
    buffers = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(buffers.values()) <= max(moved / 4, min(moved, least)) + 16


class Copied(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Collects what is copied to, and from what."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is untyped
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert "copy_" in str(func)
        self.pairs.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def test_16_bit_sgd_is_not_compared_with_a_kernel_that_is_wrong() -> None:
    names = [p.implementation for p in providers("sgd", "cpu", torch.bfloat16)]
    assert not any("fused" in name for name in names)
    assert any("fused" in p.implementation for p in providers("sgd", "cuda", torch.bfloat16))


def test_nothing_is_launched_on_a_cpu() -> None:
    params = [Parameter(torch.ones(2, 3))]
    params[0].grad = torch.ones(2, 3)
    if os.environ.get("TRITON_INTERPRET") == "1":  # without a GPU
        assert count_launches(AdamW_AGC(params, backend="triton").step, params, CPU) is None
    assert count_launches(AdamW_AGC(params, backend="torch").step, params, CPU) is None


def test_launches_are_counted_with_gradients_at_other_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(4)), Parameter(torch.ones(()))]
    for p in params[:2]:
        p.grad = torch.full_like(p, 0.5)
    grads = [p.grad for p in params]
    found: list[list[Tensor | None]] = []

    def step() -> None:
        found.append([p.grad for p in params])

    def profiled(step: Step, device: torch.device) -> list[Any]:
        assert device.type == "cuda"
        step()
        return [event(DeviceType.CUDA), event(DeviceType.CPU), event(DeviceType.CUDA)]

    monkeypatch.setattr(counters, "profiled_events", profiled)
    assert count_launches(step, params, torch.device("cuda")) == 2
    assert [id(p.grad) for p in params] == list(map(id, grads))
    assert len(found) == 2
    for i in range(2):
        tensors = [of_step[i] for of_step in (grads, *found)]
        assert len({t.data_ptr() for t in tensors if t is not None}) == 3
        assert all(t is not None and torch.equal(t, tensors[0]) for t in tensors)  # type: ignore[arg-type]
    assert [of_step[2] for of_step in found] == [None, None]


def event(device: DeviceType, is_user_annotation: bool = False) -> Any:
    return SimpleNamespace(device_type=device, is_user_annotation=is_user_annotation)


def test_a_launch_is_work_of_the_device() -> None:
    annotated = event(DeviceType.CUDA, is_user_annotation=True)
    events = [event(DeviceType.CUDA), event(DeviceType.CPU), annotated, event(DeviceType.CUDA)]
    assert launched(events) == 2


def test_events_of_torchs_profiler_say_where_they_ran() -> None:
    with torch.autograd.profiler.profile() as profiled, record_function("step"):
        torch.ones(2).add_(1)
    events = profiled.function_events or []
    assert any(e.is_user_annotation for e in events)
    assert launched(events) == 0


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
    [("", "is no table: No columns"), ("a,b\n1,2\n", "has no columns bytes_moved, ")],
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


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_our_version_tells_commits_apart(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "agc_triton"
    (tmp_path / "kernels").mkdir()
    package.mkdir()
    (package / "kernels").symlink_to("../kernels")
    (package / "__init__.py").touch()
    assert version_in(package) == agc_triton.__version__
    git("init")
    assert version_in(package) == agc_triton.__version__
    git("add", ".")
    git("commit", "-m", "first")
    clean = f"{agc_triton.__version__}+g{git('rev-parse', 'HEAD')[:7]}"
    assert version_in(package) == clean
    (tmp_path / "results.csv").touch()
    assert version_in(package) == clean
    (tmp_path / "kernels" / "step.py").touch()
    assert version_in(package) == f"{clean}.dirty"


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
    monkeypatch.setattr(memory, "free_bytes", lambda _: sgd / memory.USABLE)
    assert set(run(tmp_path / "rows.csv")["optimizer"]) == {"sgd"}
    assert measured.optimizers == ["sgd"]
    assert "tiny adamw fp32 is left out: it needs 0.0 GiB, over 90%" in capsys.readouterr().out


def quick_bytes(optimizer: str) -> int:
    compared = [*(p for p in providers(optimizer) if p.quick), copy_provider(optimizer)]
    return throughput.needed(throughput.Group("tiny", optimizer, "fp32"), compared, None)


def test_a_workload_that_is_there_is_not_counted_again() -> None:
    group = throughput.Group("tiny", "sgd", "bf16")
    workload = shapes.random_workload("tiny", torch.bfloat16)
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


def test_a_failed_write_leaves_the_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    before = pd.DataFrame({"a": [1]})
    write(before, out)

    def half_written(_: pd.DataFrame, path: Path, **_options: Any) -> None:
        Path(path).write_text("a\n")
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half_written)
    with pytest.raises(OSError, match="No space"):
        write(before, out)
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


def test_only_the_fastest_unclipped_step_is_a_line() -> None:
    names = {"ours": "ours", "slow": "unclipped", "fast": "unclipped", "copy": "copy"}
    rows = pd.DataFrame({"implementation": names.keys(), "role": names.values()})
    ax = Figure().subplots()
    plots.draw_bars(ax, rows.assign(median_ms=[4, 3, 2, 1], p20_ms=1, p80_ms=5), "rmsprop")
    assert ax.get_legend_handles_labels()[1] == ["fast: 2", "copy: 1"]


def test_readme_has_the_committed_figures() -> None:
    text = readme_table.README.read_text()
    assert list(readme_table.RESULTS.glob("throughput-*.csv"))
    assert readme_table.with_tables(text) == text


def readme_rows(**common: Any) -> pd.DataFrame:
    machine = {"device": "Some CPU", "threads": 2, "torch": "9.9"}
    model = {"model": readme_table.MODEL, "dtype": readme_table.DTYPE, "parameters": 71_489_284}
    rows = [
        {"implementation": "x", "optimizer": "sgd", "median_ms": 123.4, "ratio_to_unclipped": 2.0},
        {"implementation": "x", "optimizer": "adamw", "median_ms": 9.87, "ratio_to_unclipped": 1.0},
        {"implementation": "y", "optimizer": "sgd", "median_ms": 1, "ratio_to_unclipped": 0.5},
    ]
    return pd.DataFrame([{**machine, **model, **row, **common} for row in rows])


HEADING = "dm_nfnet_f0, float32, 71.5 million parameters on Some CPU, 2 threads, torch 9.9:"
TABLE = [
    "",
    "| ms per step (times unclipped) | SGD | Adam | AdamW | RMSprop |",
    "|---|---|---|---|---|",
    "| x | 123 (2.00) |  | 9.87 (1.00) |  |",
    "| y | 1 (0.50) |  |  |  |",
]


def test_readme_table_by_implementation_and_optimizer() -> None:
    assert readme_table.markdown(readme_rows()).splitlines() == [HEADING, *TABLE]


def test_readme_tables_are_of_one_model_and_dtype() -> None:
    others = [readme_rows(dtype="bfloat16", median_ms=0), readme_rows(model="vit", median_ms=0)]
    mixed = pd.concat([others[0], readme_rows(), others[1]])
    assert [*map(readme_table.markdown, readme_table.tables(mixed))] == [
        readme_table.markdown(readme_rows())
    ]
    assert list(readme_table.tables(pd.concat(others))) == []


def test_readme_has_a_table_for_each_machine_and_torch_of_a_csv() -> None:
    others: list[dict[str, Any]] = [{"threads": 64}, {"device": "Other CPU"}, {"torch": "10.0"}]
    both = pd.concat([readme_rows(), *(readme_rows(**other) for other in others)])
    headings = [readme_table.markdown(rows).splitlines()[0] for rows in readme_table.tables(both)]
    assert headings == [
        HEADING,
        HEADING.replace("2 threads", "64 threads"),
        HEADING.replace("Some", "Other"),
        HEADING.replace("9.9", "10.0"),
    ]


def test_readme_tables_come_from_throughput_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    readme_rows().to_csv(tmp_path / "throughput-some-cpu.csv")
    readme_rows(model="vit").to_csv(tmp_path / "throughput-other-models.csv")
    for other in ("host-cost-some-cpu", "kernels-triton-9.9", "scaling-some-cpu"):
        readme_rows(device=other).to_csv(tmp_path / f"{other}.csv")
    text = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter"
    table = "\n".join([HEADING, *TABLE])
    expected = f"before\n{readme_table.BEGIN}\n\n{table}\n\n{readme_table.END}\nafter"
    assert readme_table.with_tables(text) == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "MAX_SETS", 3)
    workload = shapes.on_device(shapes.random_workload("tiny"), torch.device("cuda"))
    compared = [p for p in providers("adamw", "cuda") if p.quick]
    rows = measure("adamw", [*compared, copy_provider("adamw")], workload, Rounds(1, 2))
    assert rows["launches"].notna().all()
    assert set(rows["sets"]) == {3}
    assert (rows["median_ms"] > 0).all()
    assert set(rows["device"]) == {torch.cuda.get_device_name()}
