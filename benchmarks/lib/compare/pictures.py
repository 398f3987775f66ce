"""Pictures of a comparison; each is of one model on one set of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from benchmarks.lib.compare.grid import MIDDLE_LR
from benchmarks.lib.compare.summary import clipping_name

Lines = Iterator[tuple[dict[str, Any], pd.DataFrame]]
Draw = Callable[[Axes, pd.DataFrame, dict[float, Any]], None]
LABELS = {"lr": "learning rate", "batch": "batch size"}


def panels(
    table: pd.DataFrame, rows: str | None, columns: str, draw: Draw, label: str, heading: str
) -> Figure:
    """A panel for each pair of values, and one legend for all; ``label`` is of the y axes."""
    of_rows = in_order(table[rows]) if rows else [None]
    of_columns = in_order(table[columns])
    size = (1.2 + 2.5 * max(2, len(of_columns)), 1.8 + 2.1 * len(of_rows))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(len(of_rows), len(of_columns), squeeze=False, sharey="row")
    palette = colors(table["clipping"].unique())
    legend: dict[str, Any] = {}
    for line, row in zip(axes, of_rows, strict=True):
        line[0].set_ylabel(label, fontsize=8)
        for ax, column in zip(line, of_columns, strict=True):
            shown = table[table[columns] == column]
            draw(ax, shown[shown[rows] == row] if rows else shown, palette)
            name = column if columns == "optimizer" else f"{LABELS.get(columns, columns)} {column}"
            ax.set_title(f"{row}, {name}" if rows else name, fontsize=9)
            ax.tick_params(which="both", labelsize=8)
            ax.grid(alpha=0.3)
            ax.set_axisbelow(True)
            handles, names = ax.get_legend_handles_labels()
            legend.update(zip(names, handles, strict=True))
    names = sorted(legend, key=[clipping_name(c) for c in palette].index)
    handles = [legend[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(heading, fontsize=9)
    return figure


def colors(clippings: Iterable[float]) -> dict[float, Any]:
    """Red without AGC, blues with it, the darker the tighter."""
    used = sorted(c for c in clippings if c)
    shades = colormaps["Blues"](np.linspace(1, 0.45, len(used)))
    return {0.0: "tab:red", **dict(zip(used, shades, strict=True))}


def lines(table: pd.DataFrame, palette: dict[float, Any]) -> Lines:
    """Each clipping with its style and its rows."""
    for clipping, color in palette.items():
        of_clipping = table[table["clipping"] == clipping]
        if not of_clipping.empty:
            # Wide and pale, so that it shows under what has the same values.
            line = {"linewidth": 1.2} if clipping else {"linewidth": 3.5, "alpha": 0.5}
            style = {"color": color, "label": clipping_name(clipping), **line}
            yield style, of_clipping


def accuracy_against(x: str) -> Draw:
    """Mean accuracy over the seeds with its standard deviation; crosses where a run diverged."""

    def draw(ax: Axes, table: pd.DataFrame, palette: dict[float, Any]) -> None:
        for style, rows in lines(table.sort_values(x), palette):
            spread = rows["std"].fillna(0)
            style |= {"marker": "o", "markersize": 3, "capsize": 2, "elinewidth": 1}
            ax.errorbar(rows[x], rows["mean"], spread, **style)
            broken = rows[rows["diverged"] > 0]
            ax.plot(broken[x], broken["mean"], "x", color=style["color"], markersize=8)
        ticks = sorted(table[x].unique())
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlabel(LABELS[x], fontsize=8)

    return draw


def losses(ax: Axes, table: pd.DataFrame, palette: dict[float, Any]) -> None:
    """Mean training loss over the seeds, in a band of one standard deviation."""
    for style, rows in lines(table, palette):
        by_seed = rows.set_index(["epoch", "seed"])["train_loss"].unstack("seed").sort_index()
        finite = by_seed.where(np.isfinite(by_seed))
        mean, std = finite.mean(axis="columns"), finite.std(axis="columns").fillna(0)
        ax.plot(mean.index, mean, marker="o", markersize=2, **style)
        low = (mean - std).clip(lower=mean / 10)  # the axis is logarithmic
        ax.fill_between(mean.index, low, mean + std, color=style["color"], alpha=0.2, linewidth=0)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch", fontsize=8)


def seconds(ax: Axes, table: pd.DataFrame, palette: dict[float, Any]) -> None:
    """Bars of the median time of an epoch's training, with the 20th to 80th percentile."""
    optimizers = in_order(table["optimizer"])
    found = list(lines(table, palette))
    width = 0.8 / len(found)
    for i, (style, rows) in enumerate(found):
        times = rows.groupby("optimizer")["seconds"].quantile(np.array([0.2, 0.5, 0.8])).unstack()
        low, middle, high = times.reindex(optimizers).to_numpy().T
        at = np.arange(len(optimizers)) + (i - (len(found) - 1) / 2) * width
        kept = {name: style[name] for name in ("color", "label")}
        ax.bar(at, middle, width, yerr=[middle - low, high - middle], **kept)
    ax.set_xticks(range(len(optimizers)), optimizers)


def in_order(values: pd.Series[Any]) -> list[Any]:
    """Each value once: numbers by size, optimizers as they are always listed."""
    found = values.unique()
    return [name for name in MIDDLE_LR if name in found] or sorted(found)
