"""The distribution of ratios by parameter, with the present and the suggested thresholds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agc_triton.choosing.layers import Layer
from agc_triton.extras import needed

if TYPE_CHECKING:
    from pandas import DataFrame

BINS = 80
PRESENT, SUGGESTED, OWN = "tab:red", "tab:blue", "black"
INCHES = 0.3  # a row's height
LARGEST = 60_000  # pixels; matplotlib draws up to 2**16


def draw(
    layers: Sequence[Layer], table: DataFrame, target: float, path: str | os.PathLike[str]
) -> None:
    """A histogram per parameter over ratios on a logarithmic axis, and lines through its group.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or its format is unknown.
    """
    figures = needed("matplotlib.figure", "suggest_clipping(plot=...) draws a picture")
    height = 2.0 + INCHES * len(layers)
    figure = figures.Figure(figsize=(9, height), layout="constrained")
    ax = figure.subplots()
    rows = table[table["level"] == "parameter"].reset_index()
    _ridges(ax, layers)
    ax.plot(rows["suggested"], rows.index, "|", color=OWN, label="suggested for the parameter")
    for label, column, color, style in (
        ("clipping as it is", "clipping", PRESENT, "-"),
        (f"suggested for the group: clips {target:.3g} of its units", "suggested", SUGGESTED, "--"),
    ):
        ax.plot([], [], style, color=color, label=label)
        for _, group in table[table["level"] == "group"].iterrows():
            at = rows.index[rows["group"] == group["group"]]
            if group[column] > 0:
                ax.plot([group[column]] * 2, [at.min() - 0.5, at.max() + 0.5], style, color=color)
    ax.set(xscale="log", ylim=(len(layers) - 0.4, -1.1))
    ax.set_yticks(rows.index, rows["name"], fontsize=8)
    ax.set_xlabel("||g|| / max(||w||, agc_eps) of each unit in each batch")
    ax.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=min(120, LARGEST / height))


def _ridges(ax: Any, layers: Sequence[Layer]) -> None:
    """Each parameter's histogram on a line of its own; ratios of 0 are said, as no log axis can."""
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    found = [torch.cat([none, *layer.ratios]) for layer in layers]
    positive = [ratios[ratios > 0].log10() for ratios in found]
    ends = torch.cat(positive).aminmax() if any(map(len, positive)) else (0.0, 0.0)
    low, high = (float(end) for end in ends)
    edges = torch.linspace(low - 0.1, high + 0.1, BINS + 1, dtype=torch.float64, device="cpu")
    for at, (ratios, logs) in enumerate(zip(found, positive, strict=True)):
        counts = torch.histogram(logs, edges).hist
        tops = at - 0.9 * counts / counts.max().clamp(min=1)
        ax.stairs(tops, 10**edges, baseline=at, fill=True, color="tab:gray", alpha=0.5)
        if note := _note(ratios, logs):
            ax.text(0.99, at, note, transform=ax.get_yaxis_transform(), ha="right", fontsize=7)


def _note(ratios: Tensor, positive: Tensor) -> str:
    if not len(ratios):
        return "no gradient"
    zeros = 1 - len(positive) / len(ratios)
    return f"{zeros:.0%} are 0" if zeros else ""
