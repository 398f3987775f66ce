"""The pictures and the table of docs/choosing-clipping.md.

    python -m benchmarks.compare --grid choosing --jobs 2 --out CSV
    python -m benchmarks.choosing_clipping CSV [--out out/choosing]

The first trains the demo's network and a small transformer on scikit-learn's digits with many
values of `clipping`; CSV is by default what it wrote for the document. The second draws accuracy
and the course of training against the share of clipped units, prints the table, and has
suggest_clipping look at both networks before training and after two epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from torch.nn import functional as F

from agc_triton import suggest_clipping
from benchmarks.lib.arguments import add_device, check_folder, parser_of
from benchmarks.lib.compare.grid import GRIDS, Run, all_runs
from benchmarks.lib.compare.pictures import colors
from benchmarks.lib.compare.summary import NoRows, clipping_name, finished, read
from benchmarks.lib.compare.training import Training, Where, data_of
from benchmarks.lib.data.sets import chunks

CSV = Path("benchmarks/results/intel-xeon-2-threads/choosing.csv")
KIND = ["model", "optimizer", "lr"]
EPOCHS = 2  # before suggest_clipping looks again
BATCHES = 2
# What is looked at: with the clipping that large batches are trained with, and usual rates.
LOOKED_AT = {"demo_nfnet": ("sgd", 0.8), "transformer": ("adamw", 0.016)}
CLIPPING = 0.01


def of_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per run that is over: its last accuracy, and the mean share of clipped units."""
    last = finished(rows)
    settings = [*Run._fields]
    share = rows.groupby(settings)["share_of_units_clipped"].agg(["first", "mean"]).reset_index()
    found = last.merge(share, on=settings)
    # An epoch that ends beyond all numbers has clipped nothing that could be counted.
    found["share"] = found["mean"].where(found["clipping"] > 0, 0.0)
    return found


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Shares and accuracies over the seeds, by network, optimizer, learning rate and clipping."""
    return runs.groupby([*KIND, "clipping"]).agg(
        share=("share", "mean"),
        share_low=("share", "min"),
        share_high=("share", "max"),
        accuracy=("test_accuracy", "mean"),
        low=("test_accuracy", "min"),
        high=("test_accuracy", "max"),
        broken=("diverged", "sum"),
        seeds=("seed", "size"),
    )


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a table; ranges are from the lowest to the highest seed."""
    lines = [
        "| network, optimizer, lr | clipping | units clipped | test accuracy | broken |",
        "|---|---|---|---|---|",
    ]
    for row in summary.reset_index().to_dict("records"):
        share = f"{row['share']:.1%} ({row['share_low']:.1%} to {row['share_high']:.1%})"
        accuracy = f"{row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        cells = [f"{row['model']}, {row['optimizer']}, {row['lr']:g}"]
        cells += [clipping_name(row["clipping"]), share if row["clipping"] else "", accuracy]
        lines.append(f"| {' | '.join(cells)} | {row['broken']:g} of {row['seeds']:g} |")
    return "\n".join(lines)


def draw_accuracy(summary: pd.DataFrame) -> Figure:
    """Accuracy against the share of clipped units, a panel per network, optimizer and rate."""
    kinds = list(summary.reset_index().groupby(KIND, sort=False))
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, -(-len(kinds) // 2), sharey=True, squeeze=False)
    palette = colors(summary.index.unique("clipping"))
    for ax, ((model, optimizer, lr), rows) in zip(axes.T.flat, kinds, strict=False):
        for row in rows.to_dict("records"):
            spans = {"accuracy": ("low", "high"), "share": ("share_low", "share_high")}
            y, x = (
                [[max(0.0, row[key] - row[low])], [max(0.0, row[high] - row[key])]]  # roundings
                for key, (low, high) in spans.items()
            )
            style: Any = {
                "color": palette[row["clipping"]],
                "label": clipping_name(row["clipping"]),
            }
            mark = "x" if row["broken"] else "o"
            ax.errorbar(row["share"], row["accuracy"], y, x, fmt=mark, capsize=2, **style)
        ax.set_title(f"{model}, {optimizer}, lr {lr:g}", fontsize=10)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlim(-0.02, 1.02)
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("units clipped in the epochs' last steps")
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy in the end")
    _legend(figure, list(axes.flat))
    figure.suptitle("mean, lowest and highest of the seeds; crosses: a run diverged or guesses")
    return figure


def draw_course(rows: pd.DataFrame) -> Figure:
    """Loss and share of clipped units by epoch, the mean of the seeds; a column per network."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    kinds = list(rows.groupby(KIND))
    axes = figure.subplots(2, len(kinds), sharex="col", sharey="row", squeeze=False)
    palette = colors(rows["clipping"].unique())
    for (loss, share), ((model, optimizer, lr), of_kind) in zip(axes.T, kinds, strict=True):
        for clipping, color in palette.items():
            mean = of_kind[of_kind["clipping"] == clipping].groupby("epoch").mean(numeric_only=True)
            for ax, column in ((loss, "train_loss"), (share, "share_of_units_clipped")):
                ax.plot(mean.index, mean[column], color=color, label=clipping_name(clipping))
                ax.grid(alpha=0.3)
        loss.set_title(f"{model}\n{optimizer}, lr {lr:g}", fontsize=9)
        loss.set(yscale="log", ylim=(0.1, 10))
        share.set(ylim=(0, 1), xlabel="epoch")
        share.yaxis.set_major_formatter(PercentFormatter(1))
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("units clipped in the epoch's last step")
    _legend(figure, axes[0])
    return figure


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Each clipping once, in order."""
    found: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    order = sorted(found, key=lambda name: float(name.rpartition(" ")[2].replace("AGC", "0")))
    figure.legend(
        [found[name] for name in order], order, loc="outside lower center", ncols=9, frameon=False
    )


def look(model: str, on: torch.device, out: Path) -> pd.DataFrame:
    """What suggest_clipping says of a network before its first step, and what after two epochs.

    It draws both; the table has the rows of both that are for all units that are clipped.
    """
    optimizer, lr = LOOKED_AT[model]
    runs = all_runs(GRIDS["choosing"])
    wanted = {"model": model, "optimizer": optimizer, "lr": lr, "clipping": CLIPPING, "seed": 0}
    (run,) = (run for run in runs if wanted.items() <= run._asdict().items())
    where = Where(device=on.type, folders={}, unfinished=out, threads=1)
    data = data_of(run, where)
    training = Training(run, data, on)

    def loss_fn(net: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(net(data.standardized(images)), labels)

    found = []
    for when, epochs in {"before": 0, "after": EPOCHS}.items():
        for _ in range(epochs):
            training.epoch()
        chosen = torch.randperm(len(data.train), generator=torch.Generator("cpu").manual_seed(0))
        parts = list(chunks(chosen, run.batch))[:BATCHES]
        batches = [data.train.pick(part) for part in parts]
        plot = out / f"choosing-{model}-{when}.png"
        table = suggest_clipping(training.net, loss_fn, batches, training.optimizer, plot=plot)
        total = table[table["level"] == "total"]
        found.append(total.assign(model=model, batch=run.batch, epochs_before=epochs))
    return pd.concat(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw and print all."""
    parser = parser_of("choosing_clipping", __doc__)
    parser.add_argument("csv", nargs="?", type=Path, default=CSV, help=f"default: {CSV}")
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("out", "choosing"), help="folder")
    args = parser.parse_args(argv)
    check_folder(parser, args.out)
    try:
        rows = read([args.csv])
        runs = of_runs(rows)
    except NoRows as error:
        parser.error(str(error))
    summary = summarize(runs)
    print(markdown(summary))
    draw_accuracy(summary).savefig(args.out / "choosing-accuracy.png", dpi=100)
    draw_course(rows).savefig(args.out / "choosing-course.png", dpi=100)
    looked = [look(model, torch.device(args.device), args.out) for model in LOOKED_AT]
    columns = ["model", "batch", "epochs_before", "units", "clipping", "clipped", "suggested"]
    print(pd.concat(looked)[columns].to_string(index=False, float_format="{:.3g}".format))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
