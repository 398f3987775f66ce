"""Trains with and without AGC over a grid of settings, a CSV row per epoch.

    python -m benchmarks.compare [--grid digits] [--jobs 2] [--out out/compare.csv] [--resume]
    python -m benchmarks.compare report [out/compare.csv ...] [--out out/compare]

A grid is every combination of data, model, optimizer, clipping (0 is torch's own optimizer, without
AGC), batch size, learning rate and seed; any of its settings can be given another value. Both arms
have the same groups, schedule (an epoch of warm-up, then cosine), seeds and order of the images.
docs/comparison.md says where data come from and what the columns are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.lib.arguments import add_device, check_file, named_folder, parser_of, positive
from benchmarks.lib.compare.grid import GRIDS, MIDDLE_LR, Run, all_runs
from benchmarks.lib.compare.jobs import Task, perform_all
from benchmarks.lib.compare.log import Log, LogError
from benchmarks.lib.compare.training import Where, data_of, forget
from benchmarks.lib.data.catalog import NAMES
from benchmarks.lib.data.sets import DataError
from benchmarks.lib.machine import cores
from benchmarks.lib.networks import SMALL, is_known

OUT = Path("out/compare.csv")
SETTINGS: dict[str, dict[str, Any]] = {
    "models": {"nargs": "+", "help": f"{', '.join(SMALL)}, or timm's names where timm is"},
    "optimizers": {"nargs": "+", "choices": sorted(MIDDLE_LR)},
    "clippings": {"nargs": "+", "type": float, "help": "0: torch's optimizer, without AGC"},
    "batches": {"nargs": "+", "type": positive},
    "lrs": {"nargs": "+", "type": float, "help": "default: by optimizer and batch size"},
    "seeds": {"type": positive, "help": "how many"},
    "epochs": {"type": positive},
    "images": {"type": positive, "help": "to train on; default: all"},
    "pixels": {"type": positive, "help": "default: the data's own, 224 of images in folders"},
    "dtype": {"choices": ["float32", "bfloat16"], "help": "of autocast"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train a grid, or report on one."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["report"]:
        # Not for every job: matplotlib takes a second to import.
        from benchmarks.lib.compare import report

        report.main(given[1:])
        return
    parser = make_parser()
    args = parser.parse_args(given)
    check_file(parser, args.out)
    runs = runs_of(args)
    where = Where(
        device=args.device,
        folders=dict(item for item in args.data or () if item[1]),
        unfinished=args.out.with_suffix(".unfinished"),
        threads=max(1, cores() // args.jobs),
    )
    try:
        check(runs, where)
        log = Log(args.out, args.resume)
    except (DataError, LogError, ValueError) as error:
        parser.error(str(error))
    try:
        failures = train_all(runs, log, args.jobs, where)
    except KeyboardInterrupt:
        sys.exit(f"{len(log.over)} of {len(runs)} runs are in {args.out}: --resume goes on")
    print(f"{len(log.over)} runs are in {args.out}; python -m benchmarks.compare report {args.out}")
    if failures:
        sys.exit(f"{len(failures)} runs were not finished: --resume tries them again")


def make_parser() -> argparse.ArgumentParser:
    """What a grid is made of, and where it is trained."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="digits", help="default: digits")
    parser.add_argument(
        "--data",
        nargs="+",
        type=named_folder,
        metavar="NAME[=FOLDER]",
        help=f"{', '.join(NAMES)}; all but digits and synthetic lie in a folder",
    )
    for name, options in SETTINGS.items():
        parser.add_argument(f"--{name}", **options)
    add_device(parser)
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time; default: 1")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    parser.add_argument("--resume", action="store_true", help="go on with the CSV")
    return parser


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The grid's, with the settings that were given in place of its own."""
    given: dict[str, Any] = {name: getattr(args, name) for name in SETTINGS}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    if args.data:
        given["data"] = tuple(name for name, _ in args.data)
    return all_runs(replace(part, **given) for part in GRIDS[args.grid])


def check(runs: Sequence[Run], where: Where) -> None:
    """Everything that a run could fail for at once, before the first."""
    for name in sorted({run.model for run in runs}):
        if not is_known(name):
            raise ValueError(f"argument --models: {name} is no model of timm's, if there is timm")
    for run in runs:
        if not 0 < run.lr < math.inf:
            raise ValueError(f"argument --lrs: {run.lr} is no learning rate")
        if not 0 <= run.clipping < math.inf:
            raise ValueError(f"argument --clippings: {run.clipping} is no clipping")
    # By data, so that each is read once.
    largest = {
        (run.data, run.images, run.pixels): run for run in sorted(runs, key=lambda r: r.batch)
    }
    for run in largest.values():
        count = len(data_of(run, where).train)
        if run.batch > count:
            raise ValueError(
                f"argument --batches: {run.batch} is more than the {count:,} images of {run.data}"
                " to train on"
            )


def train_all(runs: Sequence[Run], log: Log, jobs: int, where: Where) -> list[str]:
    """Every run that is not over; what kept any from its end."""
    for run in log.over:  # which a kill may have left there
        forget(run, where)
    tasks = [Task(run, log.written[run]) for run in runs if run not in log.over]
    done = sum(run.epochs for run in runs) - sum(t.run.epochs - t.written for t in tasks)
    failures: list[str] = []
    bar = tqdm(
        total=sum(run.epochs for run in runs),
        initial=done,
        unit="epoch",
        smoothing=0,  # runs differ in length: the mean of all foretells best
        disable=None,
    )
    with bar:
        for run, row, failure in perform_all(tasks, jobs, where):
            if row is not None:
                log.append(row)
                bar.set_postfix(accuracy=f"{row['test_accuracy']:.1%}", refresh=False)
                bar.update()
            elif failure:
                failures.append(f"{run}: {failure}")
                bar.write(failures[-1], file=sys.stderr)
            else:
                bar.update(run.epochs - log.written[run])
                forget(run, where)
    if where.unfinished.is_dir() and not any(where.unfinished.iterdir()):
        where.unfinished.rmdir()
    return failures


if __name__ == "__main__":
    main()
