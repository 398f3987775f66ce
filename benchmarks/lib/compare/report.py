"""The report on a comparison: pictures and a table in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib.arguments import check_folder, parser_of
from benchmarks.lib.compare import pictures
from benchmarks.lib.compare.grid import Run
from benchmarks.lib.compare.summary import (
    CASE,
    SETTING,
    NoRows,
    best,
    by_lr,
    finished,
    markdown,
    read,
    title,
)

CSV = Path("out/compare.csv")
OUT = Path("out/compare")
CROSSES = "crosses: at least one of them diverged or stayed near guessing"
HEADER = """# With and without AGC

Accuracy on the images that are not trained on, after the last epoch: mean ± standard deviation over
the seeds, at the learning rate that has the highest mean. Learning rates are chosen by the accuracy
that is given, for every column alike. After the semicolon: how many runs, at any of the learning
rates, diverged or stayed near guessing.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write comparison.md and its pictures."""
    parser = parser_of("compare report", __doc__)
    parser.add_argument("csv", nargs="*", type=Path, default=[CSV], help=f"default: {CSV}")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder; default: {OUT}")
    args = parser.parse_args(argv)
    check_folder(parser, args.out)
    try:
        rows = read(args.csv)
        last = finished(rows)
    except NoRows as error:
        parser.error(str(error))
    rates = by_lr(last)
    unfinished = len(rows.groupby([*Run._fields])) - len(last)
    texts = [HEADER, markdown(rates), f"On {made_on(last)}."]
    if unfinished:
        texts.append(f"{unfinished} runs are not over yet, and left out.")
    for setting, of_setting in rates.groupby(SETTING, sort=False):
        of_rows = rows.merge(of_setting[CASE].drop_duplicates(), on=CASE)
        for name, figure in draw(of_rows, of_setting, title(setting)).items():
            path = args.out / f"{slug(title(setting))}-{name}.png"
            figure.savefig(path, dpi=110)
            texts.append(f"![{title(setting)}: {name.replace('-', ' ')}]({path.name})")
    (args.out / "comparison.md").write_text("\n".join(texts) + "\n")
    print(markdown(rates))
    print(f"written to {args.out / 'comparison.md'}, with its pictures beside it")


def draw(rows: pd.DataFrame, rates: pd.DataFrame, name: str) -> dict[str, Figure]:
    """The pictures of one setting."""
    top = best(rates)
    of_best = rows.merge(top[[*CASE, "lr"]], on=[*CASE, "lr"])
    accuracy = "test accuracy"
    spread = "mean and standard deviation over the seeds"
    figures: dict[str, tuple[pd.DataFrame, str | None, str, Callable[..., Any], str, str]] = {
        "accuracy-by-lr": (
            *(rates, "optimizer", "batch", pictures.accuracy_against("lr"), accuracy),
            f"{name}\n{spread}\n{CROSSES}",
        ),
        "accuracy-by-batch": (
            *(top, None, "optimizer", pictures.accuracy_against("batch"), accuracy),
            f"{name}\neach at its best learning rate, {spread}\n{CROSSES}",
        ),
        "loss": (
            *(of_best, "optimizer", "batch", pictures.losses, "training loss"),
            f"{name}\neach at its best learning rate, {spread}",
        ),
        "time": (
            *(rows, None, "batch", pictures.seconds, "seconds"),
            f"{name}\nseconds to train an epoch: median, with the 20th to 80th percentile",
        ),
    }
    return {key: pictures.panels(*arguments) for key, arguments in figures.items()}


def made_on(last: pd.DataFrame) -> str:
    """Machines, threads and versions of the runs."""
    columns = ["device", "threads", "torch", "version"]
    machines = last[columns].astype(str).drop_duplicates()
    return "; ".join(
        f"{device}, {threads} thread{'s' if threads != '1' else ''} a run, torch {torch},"
        f" agc_triton {version}"
        for device, threads, torch, version in machines.to_numpy()
    )


def slug(text: str) -> str:
    """A name for a file."""
    return "-".join(
        "".join(c if c.isalnum() else " " for c in text.lower().replace(",", "")).split()
    )
