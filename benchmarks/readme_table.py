"""Writes README.md's table of step times from the CSVs that are committed in benchmarks/results.

python -m benchmarks.readme_table
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- python -m benchmarks.readme_table -->"
END = "<!-- end of the table -->"
MODEL, DTYPE = "dm_nfnet_f0", "float32"
TITLES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}


def main() -> None:
    """Put the tables between the markers."""
    README.write_text(with_tables(README.read_text()))


def with_tables(text: str) -> str:
    """The text with what is between the markers replaced by the tables of each CSV."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    csvs = map(pd.read_csv, sorted(RESULTS.glob("*/throughput.csv")))
    found = [markdown(rows) for csv in csvs for rows in tables(csv)]
    return "\n\n".join([before + BEGIN, *found, END + after])


def tables(csv: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of each table: one model and dtype, a machine, its threads and a torch each."""
    shown = csv[(csv["model"] == MODEL) & (csv["dtype"] == DTYPE)]
    for _, rows in shown.groupby(["device", "threads", "torch"], sort=False):
        yield rows


def markdown(rows: pd.DataFrame) -> str:
    """Median ms per step, and how many unclipped steps that is, by implementation and optimizer.

    Where the host took longer than its head start, a GPU was busy for at most that.
    """
    first = rows.iloc[0]
    threads = f", {first['threads']} threads" if pd.isna(first["head_start_ms"]) else ""
    lines = [
        f"{MODEL}, {DTYPE}, {first['parameters'] / 1e6:.1f} million parameters on"
        f" {first['device']}{threads}, torch {first['torch']}:",
        "",
        f"| ms per step (times unclipped) | {' | '.join(TITLES.values())} |",
        "|---" * (1 + len(TITLES)) + "|",
    ]
    for implementation, of_one in rows.groupby("implementation", sort=False):
        by_optimizer = of_one.set_index("optimizer")
        cells = [_cell(by_optimizer, optimizer) for optimizer in TITLES]
        lines.append(f"| {implementation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: pd.DataFrame, optimizer: str) -> str:
    if optimizer not in rows.index:
        return ""
    row: Any = rows.loc[optimizer]
    bound, ratio = row["host_ms"] > row["head_start_ms"], row["ratio_to_unclipped"]
    in_unclipped = "" if pd.isna(ratio) else f" ({ratio:.2f})"
    return f"{'≤ ' if bound else ''}{row['device_ms']:.3g}{in_unclipped}"


if __name__ == "__main__":
    main()
