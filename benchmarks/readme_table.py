"""Writes the tables of step times, and their picture, from the CSVs in benchmarks/results.

The GPUs' table is in README.md, the CPUs' in docs/benchmarks.md.

python -m benchmarks.readme_table
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from agc_triton.optim import OPTIMIZERS
from benchmarks.lib import plots

ROOT = Path(__file__).parents[1]
PAGES = {"GPU": ROOT / "README.md", "CPU": ROOT / "docs" / "benchmarks.md"}
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- python -m benchmarks.readme_table: {} -->"
END = "<!-- end of the table -->"
MODEL, DTYPE = "dm_nfnet_f0", "float32"
TITLES = {name.lower(): name for name in OPTIMIZERS}

# Of the GPUs' table and picture.
PICTURE = RESULTS / "gpu-step-times.png"
GPU_MODELS = {
    "dm_nfnet_f0": "NFNet-F0",
    "resnet50": "ResNet-50",
    "vit_base_patch16_224": "ViT-B/16",
}
GPU_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
GPU_COLUMNS = {
    "agc_triton, Triton": "clipped: agc_triton",
    "torch.optim fused, unclipped": "not clipped: torch fused",
    "timm AGC, torch.optim fused": "clipped: timm, then torch fused",
    "copy of as many bytes": "a copy of as many bytes",
}


def main() -> None:
    """Put the tables between the markers, and draw the picture."""
    for which, page in PAGES.items():
        page.write_text(with_tables(page.read_text(), which))
    _, on_gpus = committed()
    plots.gpu_step_times(gpu_rows(on_gpus), list(GPU_COLUMNS.values()), PICTURE)


def committed() -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
    """The committed results of CPUs and of GPUs, which alone have a head start."""
    csvs = list(map(pd.read_csv, sorted(RESULTS.glob("*/throughput.csv"))))
    on_gpus = [csv for csv in csvs if csv["head_start_ms"].notna().any()]
    return [csv for csv in csvs if csv["head_start_ms"].isna().all()], on_gpus


def with_tables(text: str, which: str) -> str:
    """The text with what is between the markers replaced: "GPU", one table; "CPU", one a machine.

    Raises:
        ValueError: the text does not have the markers once.
    """
    on_cpus, on_gpus = committed()
    found = [markdown(rows) for csv in on_cpus for rows in tables(csv)]
    if which == "GPU":
        found = [gpu_markdown(gpu_rows(on_gpus))] if on_gpus else []
    begin = BEGIN.format(which)
    before, rest = text.split(begin)
    _, after = rest.split(END, maxsplit=1)
    return "\n\n".join([before + begin, *found, END + after])


def gpu_rows(csvs: list[pd.DataFrame]) -> pd.DataFrame:
    """The GPUs' rows that are shown, with titles in place of names."""
    rows = pd.concat(csvs)
    shown = {"model": GPU_MODELS, "optimizer": TITLES, "dtype": GPU_DTYPES}
    for column, titles in {**shown, "implementation": GPU_COLUMNS}.items():
        rows[column] = rows[column].map(titles)
    rows["device"] = rows["device"].str.removeprefix("NVIDIA ").str.split().str[0]
    return rows[rows["optimizer"].isin(["SGD", "AdamW"])].dropna(
        subset=["model", "dtype", "implementation"]
    )


def gpu_markdown(rows: pd.DataFrame) -> str:
    """Ms per step by model, optimizer and dtype; the GPUs' figures side by side."""
    devices = sorted(rows["device"].unique(), reverse=True)
    lines = [
        f"| ms per step, {' / '.join(devices)} | {' | '.join(GPU_COLUMNS.values())} |",
        "|---" * (1 + len(GPU_COLUMNS)) + "|",
    ]
    keys = ["model", "optimizer", "dtype", "implementation", "device"]
    by_case = rows.set_index(keys)
    for case in product(GPU_MODELS.values(), ["AdamW", "SGD"], GPU_DTYPES.values()):
        cells = [
            " / ".join(_ms(by_case, (*case, column, device)) for device in devices)
            for column in GPU_COLUMNS.values()
        ]
        model, optimizer, dtype = case
        lines.append(f"| {model}, {optimizer}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(rows: pd.DataFrame, case: Any) -> str:
    if case not in rows.index:
        return "-"
    row: Any = rows.loc[case]
    return f"{_bound(row)}{row['device_ms']:.3g}"


def _bound(row: Any) -> str:
    """What stands before a time that may hold some of the host's."""
    return "≤ " if row["host_ms"] > row["head_start_ms"] else ""


def tables(csv: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of each table: one model and dtype, a machine, its threads and a torch each."""
    shown = csv[(csv["model"] == MODEL) & (csv["dtype"] == DTYPE)]
    for _, rows in shown.groupby(["device", "threads", "torch"], sort=False):
        yield rows


def markdown(rows: pd.DataFrame) -> str:
    """Median ms per step, and how many unclipped steps that is, by implementation and optimizer.

    Optimizers that were not measured have no column.
    """
    first, measured = rows.iloc[0], set(rows["optimizer"])
    titles = {name: title for name, title in TITLES.items() if name in measured}
    lines = [
        f"{MODEL}, {DTYPE}, {first['parameters'] / 1e6:.1f} million parameters on"
        f" {first['device']}, {first['threads']} threads, torch {first['torch']}:",
        "",
        f"| ms per step (times unclipped) | {' | '.join(titles.values())} |",
        "|---" * (1 + len(titles)) + "|",
    ]
    for implementation, of_one in rows.groupby("implementation", sort=False):
        by_optimizer = of_one.set_index("optimizer")
        cells = [_cell(by_optimizer, optimizer) for optimizer in titles]
        lines.append(f"| {implementation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: pd.DataFrame, optimizer: str) -> str:
    if optimizer not in rows.index:
        return ""
    row: Any = rows.loc[optimizer]
    ratio = row["ratio_to_unclipped"]
    in_unclipped = "" if pd.isna(ratio) else f" ({ratio:.2f})"
    return f"{row['device_ms']:.3g}{in_unclipped}"


if __name__ == "__main__":
    main()
