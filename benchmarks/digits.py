"""Trains a small normalizer-free network on scikit-learn's digits with SGD and with SGD_AGC.

    python -m benchmarks.digits [--seeds 3] [--epochs 30] [--device cpu] [--out out/digits]

Both get the same learning rates, schedule, seeds and order of the data, at batch 512; only the
clipping differs. On a GPU SGD_AGC's steps run in its kernels. Writes digits.csv, one row per epoch,
and digits.png. The learning rates and the clipping were chosen by measurement to show where SGD
breaks, on the images that accuracies are given for: the result is about stability, not about
generalization.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from agc_triton import SGD_AGC, param_groups
from benchmarks.lib.arguments import add_device, check_folder, parser_of, positive
from benchmarks.lib.data.catalog import load
from benchmarks.lib.learning import is_broken, warmup_and_cosine
from benchmarks.lib.machine import device_name
from benchmarks.lib.nfnet import NFNet
from benchmarks.lib.optimizers import backend

BATCH = 512
CLASSES = 10
# A second thread saves a third of the time on tensors this small, and stalls on shared cores.
THREADS = 1

# From one where both train to one where plain SGD is lost within a few steps; tried: 0.1 to 6.4.
LRS = (0.2, 0.8, 3.2)
# Tried: 0.01 to 0.16. Half of it learns more slowly at lr 0.2 and 0.8, its double fails at 3.2.
CLIPPING = 0.04
# SGD breaks without warm-up too; with it nobody can say that this was what it lacked.
WARMUP_EPOCHS = 3

COLORS = {"SGD": "tab:red", "SGD_AGC": "tab:blue"}
LOSS_CAP = 10.0  # what the picture shows instead of greater losses


class Digits(NamedTuple):
    """1,437 images to train on and 360 to test on, (N, 1, 8, 8), standardized, on one device."""

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor
    test_labels: Tensor


def load_split(on: torch.device) -> Digits:
    """Scikit-learn's bundled digits; the same split in every run."""
    data = load("digits", None, images=0, pixels=0, on=on)
    (train, train_labels), (test, test_labels) = (
        part.pick(torch.arange(len(part))) for part in (data.train, data.test)
    )
    images, held_out = (data.standardized(part) for part in (train, test))
    return Digits(images, held_out, train_labels, test_labels)


def build_optimizer(name: str, net: nn.Module, lr: float) -> Optimizer:
    """SGD or SGD_AGC with Nesterov momentum; the classifier head is not clipped."""
    if name == "SGD":
        return SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True)
    groups = param_groups(net, clipping=CLIPPING)
    return SGD_AGC(groups, lr=lr, momentum=0.9, nesterov=True)


def train(name: str, lr: float, seed: int, epochs: int, data: Digits) -> Iterator[dict[str, Any]]:
    """One run, epoch by epoch; it ends with the epoch in which a loss is not finite."""
    torch.manual_seed(seed)
    on = data.train_images.device
    net = NFNet(CLASSES).to(on)
    optimizer: Any = build_optimizer(name, net, lr)
    clips = isinstance(optimizer, SGD_AGC)
    if clips:
        optimizer.track_clipping()
    count = len(data.train_images)
    steps = math.ceil(count / BATCH)
    scheduler = warmup_and_cosine(optimizer, epochs * steps, WARMUP_EPOCHS * steps)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        total = 0.0
        order = torch.randperm(count).to(on)  # of the CPU's generator, as the weights are
        for batch in (order[i : i + BATCH] for i in range(0, count, BATCH)):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(data.train_images[batch]), data.train_labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(batch)
        with torch.no_grad():
            logits = net(data.test_images)
            test_loss = F.cross_entropy(logits, data.test_labels).item()
            accuracy = (logits.argmax(1) == data.test_labels).float().mean().item()
        yield {
            "epoch": epoch,
            "train_loss": total / count,
            "test_loss": test_loss,
            "test_accuracy": accuracy,
            "clipped": optimizer.clip_log()["clipped"] if clips else math.nan,
            "seconds": time.perf_counter() - start,
            "backend": backend(optimizer),
        }
        if not math.isfinite(total + test_loss):
            return


def train_all(seeds: int, epochs: int, on: torch.device) -> pd.DataFrame:
    """Every optimizer, learning rate and seed; ``diverged`` says whether the run broke."""
    data = load_split(on)
    runs = [(name, lr, seed) for lr in LRS for seed in range(seeds) for name in COLORS]
    tables = []
    with tqdm(total=len(runs) * epochs, unit="epoch", disable=None) as bar:
        for name, lr, seed in runs:
            bar.set_description(f"{name}, lr {lr:g}, seed {seed}")
            rows = []
            for row in train(name, lr, seed, epochs, data):
                rows.append(row)
                bar.set_postfix(accuracy=f"{row['test_accuracy']:.1%}", refresh=False)
                bar.update()
            bar.update(epochs - len(rows))
            table = pd.DataFrame(rows)
            table.insert(0, "optimizer", name)
            table.insert(1, "lr", lr)
            table.insert(2, "clipping", CLIPPING if name == "SGD_AGC" else 0.0)
            table.insert(3, "seed", seed)
            tables.append(table.assign(diverged=run_is_broken(table)))
    return pd.concat(tables, ignore_index=True).assign(
        batch=BATCH,
        torch=torch.__version__,
        device=device_name(on),
        threads=torch.get_num_threads(),
    )


def run_is_broken(run: pd.DataFrame) -> bool:
    """Whether a run's loss stopped being finite or its last accuracy is near guessing."""
    last = run.iloc[-1]
    return is_broken(last["train_loss"] + last["test_loss"], last["test_accuracy"], CLASSES)


def summarize(epochs: pd.DataFrame) -> pd.DataFrame:
    """Median final test accuracy, runs and broken runs by learning rate and optimizer."""
    last = epochs.groupby(["lr", "optimizer", "seed"]).tail(1)
    return last.groupby(["lr", "optimizer"]).agg(
        median_test_accuracy=("test_accuracy", "median"),
        runs=("diverged", "size"),
        broken_runs=("diverged", "sum"),
    )


def verdict(summary: pd.DataFrame) -> str:
    """What the summary shows, in words."""
    broken = summary["broken_runs"].unstack("optimizer")
    accuracy = summary["median_test_accuracy"].unstack("optimizer")
    lost = broken.index[broken.sum(axis="columns") > 0]
    best = [f"{accuracy[name].max():.1%} (lr {accuracy[name].idxmax():g})" for name in COLORS]
    sentences = [f"Best median test accuracy: {_beside(best)}."]
    if lost.empty:
        sentences.insert(0, "No run broke: this shows nothing that clipping would prevent.")
    else:
        runs = summary["runs"].unstack("optimizer").loc[lost]
        counts = [f"{broken.loc[lost, name].sum()} of {runs[name].sum()}" for name in COLORS]
        sentences.insert(0, f"Runs that broke at lr {_listed(lost)}: {_beside(counts)}.")
    for lr in broken.index.difference(lost):
        reached = [f"{accuracy.loc[lr, name]:.1%}" for name in COLORS]
        sentences.append(f"At lr {lr:g}, where none broke: {_beside(reached)}.")
    return " ".join(sentences)


def on_what(epochs: pd.DataFrame) -> str:
    """Where the steps were made, and by what."""
    last = epochs.drop_duplicates("optimizer", keep="last")
    made = [f"{name}'s steps by {by}" for name, by in last[["optimizer", "backend"]].to_numpy()]
    return f"On {last['device'].iloc[0]}: {', '.join(made)}."


def _beside(values: Sequence[str]) -> str:
    return ", ".join(f"{value} with {name}" for name, value in zip(COLORS, values, strict=True))


def _listed(lrs: pd.Index[Any]) -> str:
    return " and ".join(f"{lr:g}" for lr in lrs)


def plot(epochs: pd.DataFrame, path: Path) -> None:
    """Loss, accuracy and clipped units by learning rate: median and range of the seeds."""
    broken = summarize(epochs)[["broken_runs", "runs"]].astype(str).agg(" of ".join, axis="columns")
    finite = np.isfinite(epochs["train_loss"] + epochs["test_loss"])
    capped = epochs["train_loss"].where(finite, math.inf).clip(upper=LOSS_CAP)
    epochs = epochs.assign(finite=finite, train_loss=capped)
    lrs = sorted(epochs["lr"].unique())
    figure = Figure(figsize=(4.2 * len(lrs), 9), layout="constrained")
    axes = figure.subplots(3, len(lrs), sharex=True, sharey="row", squeeze=False)
    for (loss, accuracy, clipped), lr in zip(axes.T, lrs, strict=True):
        counts = ", ".join(f"{name} {broken[lr, name]}" for name in COLORS)
        loss.set_title(f"learning rate {lr:g}\nbroken runs: {counts}", fontsize=10)
        loss.set(yscale="log", ylim=(1e-3, 1.5 * LOSS_CAP))
        accuracy.set(ylim=(0, 1), xlim=(0.5, epochs["epoch"].max() + 0.5))
        clipped.set(ylim=(0, 0.5), xlabel="epoch")
        for ax in (accuracy, clipped):
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        accuracy.axhline(1 / CLASSES, color="gray", linestyle=":", label="guessing")
        for name, color in COLORS.items():
            runs = epochs[(epochs["lr"] == lr) & (epochs["optimizer"] == name)]
            _draw(loss, runs, "train_loss", name, color)
            _draw(accuracy, runs, "test_accuracy", name, color)
            if runs["clipped"].notna().any():
                _draw(clipped, runs, "clipped", name, color)
        accuracy.plot([], [], "kx", label="loss no longer finite: run stopped")
    axes[0, 0].set_ylabel(f"training loss (capped at {LOSS_CAP:g})")
    axes[1, 0].set_ylabel("test accuracy")
    axes[2, 0].set_ylabel("units clipped, last step")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"A normalizer-free network on digits, batch {BATCH}: SGD with and without adaptive"
        f" gradient clipping\nline: median of {epochs['seed'].nunique()} seeds;"
        " band: lowest to highest"
    )
    figure.savefig(path, dpi=120)


def _draw(ax: Axes, runs: pd.DataFrame, column: str, name: str, color: str) -> None:
    """Median, range and a cross where a run stopped; it is drawn on with its last value."""
    by_seed = runs.set_index(["epoch", "seed"])[column].unstack("seed").sort_index().ffill()
    ax.plot(by_seed.index, by_seed.median(axis="columns"), color=color, label=name)
    low, high = by_seed.min(axis="columns"), by_seed.max(axis="columns")
    ax.fill_between(by_seed.index, low, high, color=color, alpha=0.2, linewidth=0)
    stops = runs[~runs["finite"]]
    ax.plot(stops["epoch"], stops[column], "x", color=color, markersize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Train everything, write the CSV and the picture, print the summary."""
    parser = parser_of("digits", __doc__)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--epochs", type=positive, default=30)
    add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("out", "digits"), help="folder")
    args = parser.parse_args(argv)
    check_folder(parser, args.out)

    torch.set_num_threads(THREADS)
    epochs = train_all(args.seeds, args.epochs, torch.device(args.device))
    csv, png = args.out / "digits.csv", args.out / "digits.png"
    epochs.to_csv(csv, index=False)
    plot(epochs, png)
    summary = summarize(epochs)
    print(summary.to_string(formatters={"median_test_accuracy": "{:.1%}".format}))
    print(verdict(summary))
    print(on_what(epochs))
    print(f"written to {csv} and {png}")


if __name__ == "__main__":
    main()
