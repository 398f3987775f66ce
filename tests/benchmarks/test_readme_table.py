"""The tables of README.md and docs/benchmarks.md are those of the committed results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import readme_table
from benchmarks.lib import plots


@pytest.mark.parametrize("which", readme_table.PAGES)
def test_pages_have_the_committed_figures(which: str) -> None:
    text = readme_table.PAGES[which].read_text()
    assert list(readme_table.RESULTS.glob("*/throughput.csv"))
    assert readme_table.with_tables(text, which) == text


def readme_rows(**common: Any) -> pd.DataFrame:
    machine: dict[str, Any] = {"device": "Some CPU", "threads": 2, "torch": "9.9"}
    machine |= {"host_ms": 200.0, "head_start_ms": math.nan}
    model = {"model": readme_table.MODEL, "dtype": readme_table.DTYPE, "parameters": 71_489_284}
    rows = [
        {"implementation": "x", "optimizer": "sgd", "device_ms": 123.4, "ratio_to_unclipped": 2.0},
        {"implementation": "x", "optimizer": "adamw", "device_ms": 9.87, "ratio_to_unclipped": 1.0},
        {"implementation": "x", "optimizer": "radam", "device_ms": 5, "ratio_to_unclipped": None},
        {"implementation": "y", "optimizer": "sgd", "device_ms": 1, "ratio_to_unclipped": 0.5},
    ]
    return pd.DataFrame([{**machine, **model, **row, **common} for row in rows])


HEADING = "dm_nfnet_f0, float32, 71.5 million parameters on Some CPU, 2 threads, torch 9.9:"


TABLE = [
    "",
    "| ms per step (times unclipped) | SGD | AdamW | RAdam |",
    "|---|---|---|---|",
    "| x | 123 (2.00) | 9.87 (1.00) | 5 |",
    "| y | 1 (0.50) |  |  |",
]


def test_readme_table_by_implementation_and_optimizer() -> None:
    assert readme_table.markdown(readme_rows()).splitlines() == [HEADING, *TABLE]


def test_readme_tables_are_of_one_model_and_dtype() -> None:
    others = [readme_rows(dtype="bfloat16", device_ms=0), readme_rows(model="vit", device_ms=0)]
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
    for machine, rows in {"a": readme_rows(), "b": readme_rows(model="vit")}.items():
        (tmp_path / machine).mkdir()
        rows.to_csv(tmp_path / machine / "throughput.csv")
    for other in ("a/host-cost", "b/scaling", "kernels-triton-9.9", "throughput"):
        readme_rows(device=other).to_csv(tmp_path / f"{other}.csv")
    table = "\n\n" + "\n".join([HEADING, *TABLE])
    for which, expected in {"GPU": "", "CPU": table}.items():
        begin = readme_table.BEGIN.format(which)
        text = f"before\n{begin}\nold\n{readme_table.END}\nafter"
        assert readme_table.with_tables(text, which) == (
            f"before\n{begin}{expected}\n\n{readme_table.END}\nafter"
        )


def gpu_rows() -> pd.DataFrame:
    """Two GPUs' rows; in one the host took longer than the head start."""
    case = {"model": "resnet50", "optimizer": "adamw", "dtype": "float32", "head_start_ms": 1.0}
    rows = [
        {**case, "device": device, "implementation": name, "device_ms": ms, "host_ms": host}
        for device, ms, host in (("NVIDIA H100 80GB HBM3", 0.25, 1.5), ("NVIDIA H200", 0.2, 0.5))
        for name in readme_table.GPU_COLUMNS
    ]
    other = {**rows[0], "model": "another"}
    return readme_table.gpu_rows([pd.DataFrame(rows[:4]), pd.DataFrame([*rows[4:], other])])


def test_gpus_stand_side_by_side_and_bounds_are_marked() -> None:
    lines = readme_table.gpu_markdown(gpu_rows()).splitlines()
    assert lines[0].startswith("| ms per step, H200 / H100 | clipped: agc_triton |")
    (row,) = (line for line in lines if line.startswith("| ResNet-50, AdamW, fp32 |"))
    assert row.split(" | ")[1] == "0.2 / ≤ 0.25"
    (absent,) = (line for line in lines if line.startswith("| NFNet-F0, SGD, bf16 |"))
    assert absent.split(" | ")[1] == "- / -"


def test_the_picture_of_the_gpus(tmp_path: Path) -> None:
    path = tmp_path / "bars.png"
    plots.gpu_step_times(gpu_rows(), list(readme_table.GPU_COLUMNS.values()), path)
    assert path.read_bytes().startswith(b"\x89PNG")
