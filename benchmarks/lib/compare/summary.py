"""What the rows show: means and spreads over seeds, and each one's best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.lib.compare.grid import MIDDLE_LR, Run
from benchmarks.lib.compare.training import COLUMNS

# What must be the same for accuracies to be compared, besides optimizer and batch.
SETTING = ["data", "pixels", "images", "epochs", "dtype", "model"]
CASE = [*SETTING, "optimizer", "batch", "clipping"]


class NoRows(Exception):
    """CSVs without anything to report on."""


def read(paths: Sequence[Path]) -> pd.DataFrame:
    """The rows of all files."""
    tables = []
    for path in paths:
        if not path.is_file():
            raise NoRows(f"{path} is no file: python -m benchmarks.compare --out {path} writes it")
        table = pd.read_csv(path)
        if table.columns.tolist() != COLUMNS:
            raise NoRows(f"{path} has not the columns that python -m benchmarks.compare writes")
        tables.append(table)
    return pd.concat(tables, ignore_index=True).drop_duplicates([*Run._fields, "epoch"])


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """The last row of each run that is over."""
    last = rows.sort_values("epoch").groupby([*Run._fields], sort=False).tail(1)
    over = (last["epoch"] == last["epochs"]) | ~np.isfinite(last["train_loss"] + last["test_loss"])
    if not over.any():
        raise NoRows("no run is over yet")
    return last[over]


def by_lr(last: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in the end over the seeds of each learning rate, and how many runs diverged."""
    of_lr = last.groupby([*CASE, "lr"])
    return of_lr.agg(
        mean=("test_accuracy", "mean"),
        std=("test_accuracy", "std"),
        seeds=("seed", "size"),
        diverged=("diverged", "sum"),
    ).reset_index()


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Of each case the learning rate with the highest mean accuracy."""
    highest = table.groupby(CASE)["mean"].idxmax().to_numpy()
    return table.loc[highest].reset_index(drop=True)


def markdown(table: pd.DataFrame) -> str:
    """A table of each setting: the best learning rate, and runs that diverged at any."""
    texts = []
    for setting, cases in table.groupby(SETTING):
        clippings = sorted(cases["clipping"].unique())
        names = ["optimizer", "batch", *map(clipping_name, clippings)]
        lines = [f"## {title(setting)}", "", _line(names), _line(["---"] * len(names))]
        order = cases["optimizer"].map([*MIDDLE_LR].index).argsort(kind="stable")
        pairs = cases.iloc[order].groupby(["optimizer", "batch"], sort=False)
        for (optimizer, batch), of_case in pairs:
            cells = [_cell(of_case[of_case["clipping"] == clipping]) for clipping in clippings]
            lines.append(_line([optimizer, batch, *cells]))
        texts.append("\n".join(lines))
    return "\n\n".join(texts) + "\n"


def _cell(rates: pd.DataFrame) -> str:
    """Accuracy, learning rate, and how many of all runs diverged."""
    if rates.empty:
        return ""
    top = rates.nlargest(1, "mean").iloc[0]
    spread = f" ± {100 * top['std']:.1f}" if top["seeds"] > 1 else ""
    diverged = f"{rates['diverged'].sum()} of {rates['seeds'].sum()}"
    return f"{100 * top['mean']:.1f}{spread} (lr {top['lr']:g}); {diverged}"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def clipping_name(clipping: float) -> str:
    """What a curve is called."""
    return f"AGC {clipping:g}" if clipping else "no AGC"


def title(setting: Sequence[object]) -> str:
    """A setting in words."""
    data, pixels, images, epochs, dtype, model = setting
    of = [f"{images:,} images" if images else "", f"{pixels} pixels" if pixels else ""]
    return ", ".join(filter(None, (f"{model} on {data}", *of, f"{epochs} epochs", str(dtype))))
