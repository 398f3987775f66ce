"""Pictures of what the benchmarks write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

COLORS = {
    "ours": "tab:blue",
    "wrapper": "tab:cyan",
    "peer": "tab:gray",
    "unclipped": "tab:red",
    "copy": "tab:green",
}
BARS = ["ours", "wrapper", "peer"]
# Keeps a figure legible where a line runs through it.
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
LINES = {"unclipped": "-", "copy": ":"}


def step_times(table: pd.DataFrame, csv: Path) -> list[Path]:
    """Bars of step time per implementation: a file beside the CSV per model and dtype.

    Where the CSV is of several machines, their names are in those of the files.
    """
    paths = []
    several = len(table[["device", "threads"]].drop_duplicates()) > 1
    for (device, threads, model, dtype), rows in table.groupby(
        ["device", "threads", "model", "dtype"], sort=False
    ):
        optimizers = list(rows["optimizer"].unique())
        bars = max(rows[rows["role"].isin(BARS)].groupby("optimizer").size())
        size = (10, 0.9 + len(optimizers) * (1.0 + 0.26 * bars))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(optimizers), 1, squeeze=False, sharex=True)[:, 0]
        for ax, optimizer in zip(axes, optimizers, strict=True):
            draw_bars(ax, rows[rows["optimizer"] == optimizer], str(optimizer))
        axes[-1].set_xlim(0, 1.12 * rows["p80_ms"].max())
        axes[-1].set_xlabel("ms per step: median, with the 20th to 80th percentile")
        figure.suptitle(f"{model}, {dtype}, on {device}, {threads} threads", fontsize=11)
        machine = f"{_slug(str(device))}-{threads}-" if several else ""
        path = csv.with_name(f"{csv.stem}-{machine}{model}-{dtype}.png")
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def draw_bars(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    """A bar per implementation that clips, and lines for the fastest that does not and the copy."""
    bars = rows[rows["role"].isin(BARS)]
    spread = [bars["device_ms"] - bars["p20_ms"], bars["p80_ms"] - bars["device_ms"]]
    drawn = ax.barh(
        bars["implementation"],
        bars["device_ms"],
        xerr=spread,
        color=bars["role"].map(COLORS),
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    high = bars["p80_ms"].max()
    for bar, ms, end in zip(drawn, bars["device_ms"], bars["p80_ms"], strict=True):
        y = bar.get_y() + bar.get_height() / 2
        ax.text(end + 0.01 * high, y, f"{ms:.3g}", va="center", fontsize=8, bbox=BEHIND)
    for role, style in LINES.items():
        fastest = rows[rows["role"] == role].nsmallest(1, "device_ms")
        for name, ms in fastest[["implementation", "device_ms"]].values:
            ax.axvline(ms, color=COLORS[role], linestyle=style, label=f"{name}: {ms:.3g}")
    ax.invert_yaxis()
    ax.set_title(title, loc="left", fontsize=10)
    ax.tick_params(labelbottom=True, labelsize=8)
    ax.legend(
        fontsize=8,
        ncols=3,
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
    )


def gpu_step_times(rows: pd.DataFrame, implementations: list[str], path: Path) -> None:
    """Bars of ms per step on GPUs, of the first two implementations; the last is the floor.

    The third, far beyond the others, is told in words. White behind, for any theme around it.
    """
    ours, unclipped, far, floor = implementations
    devices = sorted(rows["device"].unique(), reverse=True)
    figure = Figure(figsize=(9, 0.9 + 2.9 * len(devices)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(devices), 1, squeeze=False)[:, 0]
    for ax, device in zip(axes, devices, strict=True):
        of_device = rows[rows["device"] == device]
        cases = of_device.groupby(["model", "optimizer", "dtype"], sort=False)
        for at, (_, of_case) in enumerate(cases):
            by_name = of_case.set_index("implementation")
            ms = by_name["device_ms"]
            for left, name, role in ((-0.2, ours, "ours"), (0.2, unclipped, "unclipped")):
                bound = by_name["host_ms"][name] > by_name["head_start_ms"][name]
                ax.bar(at + left, ms[name], 0.4, color=COLORS[role], alpha=0.4 if bound else 1)
            ax.hlines(ms[floor], at - 0.42, at + 0.42, color="black")
            ax.text(at, 1.02 * max(ms[ours], ms[unclipped]), f"{ms[far]:.0f}", ha="center")
        names = [" ".join(case) for case, _ in cases]
        ax.set_xticks(range(len(cases)), names, rotation=25, ha="right")
        ax.tick_params(labelsize=8)
        ax.margins(y=0.12)
        ax.set_ylabel(f"{device}: ms per step")
    handles = [
        Patch(color=COLORS["ours"], label=ours),
        Patch(color=COLORS["unclipped"], label=unclipped),
        Line2D([], [], color="black", label=floor),
        Line2D([], [], linestyle="", label=f"the number above: {far}"),
        Patch(color="tab:gray", alpha=0.4, label="pale: at most"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def training(table: pd.DataFrame, csv: Path) -> Path:
    """Bars of images per second: median of the turns, from the slowest to the fastest."""
    groups = list(table.groupby(["model", "pixels", "batch"], sort=False))
    figure = Figure(figsize=(8, 0.8 + 1.5 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for ax, ((model, pixels, batch), rows) in zip(axes, groups, strict=True):
        turns = rows.groupby(["implementation", "role"], sort=False)["images_per_s"]
        bars = turns.agg(["median", "min", "max"]).reset_index()
        spread = [bars["median"] - bars["min"], bars["max"] - bars["median"]]
        colors = bars["role"].map(COLORS)
        drawn = ax.barh(bars["implementation"], bars["median"], xerr=spread, color=colors)
        ax.bar_label(drawn, fmt="{:,.4g}", padding=3, fontsize=8)
        ax.margins(x=0.1)
        ax.invert_yaxis()
        ax.set_title(f"{model}, {pixels} pixels, batch {batch}", loc="left", fontsize=10)
        ax.tick_params(labelsize=8)
    axes[-1].set_xlabel("images per second: median of the turns, slowest to fastest")
    first = table.iloc[0]
    figure.suptitle(f"Training steps in {first['dtype']} on {first['device']}", fontsize=11)
    path = csv.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def _slug(text: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return "-".join(word for word in words if word not in ("r", "tm", "processor", "cpu"))


def scaling(table: pd.DataFrame, csv: Path) -> Path:
    """Step time along each axis, beside what ours would be at the largest case's ns per element."""
    axes_names = list(table["axis"].unique())
    figure = Figure(figsize=(4.2 * len(axes_names), 4.4), layout="constrained")
    axes = figure.subplots(1, len(axes_names), squeeze=False, sharey=True)[0]
    labels = {"unit_length": "elements per unit"}
    for ax, axis in zip(axes, axes_names, strict=True):
        rows = table[table["axis"] == axis]
        for (name, role), line in rows.groupby(["implementation", "role"], sort=False):
            x = line["parameters" if axis == "elements" else axis]
            _errorbar(ax, x, line, "device_ms", label=name, color=COLORS[str(role)])
            if role == "ours":
                linear = line["device_ms"] / line["ratio_to_largest"]
                ax.plot(x, linear, color="tab:gray", linestyle="--", label="linear in elements")
        ax.set(xscale="log", yscale="log", xlabel=labels.get(axis, axis), title=_fixed(rows, axis))
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ms per step: median, 20th to 80th percentile")
    axes[0].legend(fontsize=8)
    first = table.iloc[0]
    figure.suptitle(
        f"{first['optimizer']}, {first['dtype']}, on {first['device']}, {first['threads']} threads",
        fontsize=11,
    )
    path = csv.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def _errorbar(ax: Axes, x: pd.Series[int], line: pd.DataFrame, column: str, **style: Any) -> None:
    """Medians, and bars from the 20th to the 80th percentile."""
    unit = column.rpartition("_")[2]
    median, low, high = (line[name] for name in (column, f"p20_{unit}", f"p80_{unit}"))
    ax.errorbar(
        x, median, [median - low, high - median], marker="o", markersize=4, capsize=2, **style
    )


def bandwidth(table: pd.DataFrame, csv: Path) -> Path:
    """Bytes that a step must move, per second, by unit length, beside those of a copy."""
    rows = table[(table["axis"] == "unit_length") & (table["role"] == "ours")]
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    x, reached = rows["unit_length"], rows["gb_per_s"]
    # A step's p20 of time is its p80 of bandwidth.
    high, low = (reached * rows["device_ms"] / rows[column] for column in ("p20_ms", "p80_ms"))
    ours = str(rows["implementation"].iloc[0])
    copied = reached / rows["share_of_copy_bandwidth"]
    ax.plot(
        x, copied, marker="o", color=COLORS["copy"], linestyle=":", label="copy of as many bytes"
    )
    spread = [reached - low, high - reached]
    ax.errorbar(x, reached, spread, marker="o", capsize=2, color=COLORS["ours"], label=ours)
    ax.set(xscale="log", xlabel="elements per unit", ylabel="GB/s: median, 20th to 80th percentile")
    ax.set_ylim(0, 1.1 * max(high.max(), copied.max()))
    ax.set_title(f"{rows['optimizer'].iloc[0]}, {_fixed(rows, 'unit_length')}", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend()
    first = rows.iloc[0]
    figure.suptitle(f"Bandwidth on {first['device']}, {first['threads']} threads", fontsize=11)
    path = csv.with_name(f"{csv.stem}-bandwidth.png")
    figure.savefig(path, dpi=120)
    return path


def _fixed(rows: pd.DataFrame, axis: str) -> str:
    last = rows.iloc[-1]
    fixed = {
        "elements": f"{last['parameters']:,} elements",
        "tensors": f"{last['tensors']:,} tensors",
        "unit_length": f"{last['unit_length']:,} elements per unit",
    }
    return ", ".join(text for name, text in fixed.items() if name != axis)


def host_cost(table: pd.DataFrame, csv: Path) -> Path:
    """Python's time per step by tensors in one group and by groups, for warm and cold caches."""
    kinds_of_caches = list(table["caches"].unique())
    figure = Figure(figsize=(9, 3.4 * len(kinds_of_caches)), layout="constrained")
    axes = figure.subplots(len(kinds_of_caches), 2, sharey=True, sharex="col", squeeze=False)
    styles = {"steady": "-", "changing": "--"}
    implementations = table["implementation"].unique()
    palette = ["tab:blue", "tab:purple", "tab:red", "tab:cyan", "tab:gray"]
    colors = dict(zip(implementations, palette, strict=False))
    grouped = table.sort_values("groups")["tensors"].iloc[-1]
    panels = {
        "tensors": (table["groups"] == 1, "one parameter group"),
        "groups": (table["tensors"] == grouped, f"{grouped} tensors"),
    }
    for row, caches in zip(axes, kinds_of_caches, strict=True):
        for ax, (x, (shown, title)) in zip(row, panels.items(), strict=True):
            rows = table[shown & (table["caches"] == caches)]
            for (name, kind), line in rows.groupby(["implementation", "kind"], sort=False):
                style = {"color": colors[name], "linestyle": styles[str(kind)]}
                _errorbar(ax, line[x], line, "median_us", label=f"{name}, {kind}", **style)
            ax.set(xscale="log", yscale="log", title=f"{title}, {caches} caches")
            ax.title.set_fontsize(10)
            ax.grid(alpha=0.3)
        row[0].set_ylabel("µs per step")
    for ax, x in zip(axes[-1], panels, strict=True):
        ax.set_xlabel(x)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(
        f"Host time of a step, nothing launched, on {table['device'].iloc[0]}:"
        " median, 20th to 80th percentile",
        fontsize=11,
    )
    path = csv.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path
