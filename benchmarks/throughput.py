"""Step time and bandwidth of every implementation, over models, optimizers and dtypes.

python -m benchmarks.throughput              NFNet-F0 on a CPU, all thirteen models on a GPU
python -m benchmarks.throughput --quick      NFNet-F0, SGD and AdamW, the most telling ones
python -m benchmarks.throughput --resume     goes on where a run was ended

On a GPU device_ms is what the device is busy for, with the step issued ahead of it; host_ms what
the call takes; alone_ms the time from an idle device until the step is done. All ratios are of
device_ms. On a CPU the three are one.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.lib import plots
from benchmarks.lib.arguments import add_device, check_file, parser_of, positive
from benchmarks.lib.copying import copy_provider
from benchmarks.lib.machine import device_name
from benchmarks.lib.measure import Rounds, measure
from benchmarks.lib.memory_limits import bytes_needed, why_not
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.patience import Patience
from benchmarks.lib.providers import ALGORITHMS, Provider, providers
from benchmarks.lib.rows import COLUMNS, write
from benchmarks.lib.versions import triton_version
from benchmarks.lib.workloads import Workload, load_shapes, model_names, random_workload

MODEL = "dm_nfnet_f0"
THREADS = 2
# Seconds to compile an implementation, and for all of a run, so that it ends within 15 minutes.
COMPILE_EACH, COMPILE_ALL = 180, 300
COMPILED = ("sgd", "adamw")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHOWN = [
    *("model", "optimizer", "dtype", "implementation", "device_ms", "p20_ms", "p80_ms", "host_ms"),
    *("alone_ms", "gb_per_s", "share_of_copy_bandwidth", "ratio_to_unclipped"),
    *("ratio_to_best_peer", "launches"),
]


class Group(NamedTuple):
    """What is measured in one go, its implementations taking turns."""

    model: str
    optimizer: str
    dtype: str


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults that depend on the device filled in."""
    models = model_names()
    parser = parser_of("throughput", __doc__)
    parser.add_argument("--models", nargs="+", choices=models, help=f"default: {MODEL} on a CPU")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    add_device(parser)
    parser.add_argument(
        "--threads", type=positive, default=THREADS, help="on a CPU; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile everywhere and however long it takes; without it, whole runs on a GPU"
        f" compile for {MODEL} with SGD and AdamW, three minutes at most each",
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--plot", action="store_true", help="a picture per model and dtype")
    parser.add_argument("--out", type=Path, default=Path("out/throughput.csv"))
    args = parser.parse_args(argv)
    check_file(parser, args.out)
    args.earlier = pd.DataFrame(columns=COLUMNS)
    if args.resume and args.out.exists():
        args.earlier = earlier_rows(args.out, parser)
    everything = args.device == "cuda" and not args.quick
    # The others of a whole run on a GPU are measured as with --quick.
    args.whole = args.models or [MODEL]
    args.models = args.models or (models if everything else [MODEL])
    args.optimizers = args.optimizers or (["sgd", "adamw"] if args.quick else list(OPTIMIZERS))
    args.dtypes = args.dtypes or (["fp32"] if args.quick else list(DTYPES))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure group by group; the CSV has every group that was finished."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    on = torch.device(args.device)
    # SGD's second step is compiled anew.
    rounds = Rounds(warmup=2, timed=timed_rounds(args))
    patience = Patience(COMPILE_EACH, COMPILE_ALL)
    table, kept = args.earlier, 0
    workload: Workload | None = None
    for group in tqdm(list(groups(args)), desc="throughput", unit="group", disable=None):
        compared = compared_in(group, args, patience)
        same = belongs(table, group, on)
        if is_measured(table[same], compared):
            kept += 1
            continue
        if workload is not None and not is_of(workload, group):
            workload = None  # frees its memory first
        gc.collect()  # a process' first steps leave cycles that hold parameters
        if reason := why_not(needed(group, compared, workload), on):
            tqdm.write(f"{' '.join(group)} is left out: {reason}")
            continue
        workload = workload or random_workload(group.model, DTYPES[group.dtype], device=on)
        try:
            rows = measure(group.optimizer, compared, workload, rounds)
        except torch.OutOfMemoryError as error:
            tqdm.write(f"{' '.join(group)} is left out: {error}")
            continue
        # Ratios are between rows of one run: what there was of this group goes as a whole.
        table = pd.concat([table[~same], rows], ignore_index=True) if len(table) else rows
        write(table, args.out)
    if args.resume:
        print(f"groups kept as they were in {args.out}: {kept}")
    print(table[SHOWN].to_string(index=False, float_format="{:.3f}".format))
    for _, rows in table.groupby(["device", "threads", *Group._fields], sort=False):
        print(verdict(rows))
    print(f"on {device_name(on)}; every row is in {args.out}")
    if args.plot:
        for path in plots.step_times(table, args.out):
            print(f"drawn in {path}")


def timed_rounds(args: argparse.Namespace) -> int:
    """Rounds that are timed: on a GPU they cost little."""
    if args.device == "cuda":
        return 10
    return 5 if args.quick else 12


def compared_in(group: Group, args: argparse.Namespace, patience: Patience) -> list[Provider]:
    """What takes turns in a group."""
    quick = args.quick or group.model not in args.whole
    worth_it = group.model == MODEL and group.optimizer in COMPILED
    compiled: Sequence[str] = ()
    if args.compile:
        compiled = ALGORITHMS
    elif args.device == "cuda" and worth_it and not quick:
        compiled = ALGORITHMS[:1]
    limit = None if args.compile else patience
    dtype = DTYPES[group.dtype]
    known = providers(group.optimizer, args.device, dtype, compiled, limit)
    return [*(p for p in known if p.quick or not quick), copy_provider(group.optimizer)]


def verdict(rows: pd.DataFrame) -> str:
    """The fastest of ours beside the fastest peer and the unclipped step, in words."""
    roles = (rows[rows["role"] == role].nsmallest(1, "device_ms") for role in ("ours", "peer"))
    ours, peer = (fastest.iloc[0] for fastest in roles)
    return (
        f"{ours['model']} {ours['optimizer']} {ours['dtype']}: {ours['implementation']} takes"
        f" {ours['device_ms']:.3g} ms a step, {ours['ratio_to_best_peer']:.2f} times as fast as"
        f" {peer['implementation']} ({peer['device_ms']:.3g} ms),"
        f" {ours['ratio_to_unclipped']:.2f} times the unclipped step;"
        f" peak extra memory {ours['peak_extra_share']:.1%} of the parameters"
    )


def groups(args: argparse.Namespace) -> Iterator[Group]:
    """What the command line asks for; what shares a workload comes together."""
    for model in args.models:
        for dtype in args.dtypes:
            for optimizer in args.optimizers:
                yield Group(model, optimizer, dtype)


def is_of(workload: Workload, group: Group) -> bool:
    """Whether it has the group's model and dtype."""
    return (workload.model, workload.params[0].dtype) == (group.model, DTYPES[group.dtype])


def needed(group: Group, compared: Sequence[Provider], workload: Workload | None) -> int:
    """Bytes to measure a group, with its workload where that is not there yet."""
    sizes = [math.prod(shape) for shape in load_shapes(group.model)]
    itemsize = DTYPES[group.dtype].itemsize
    workload_bytes = 0 if workload else 2 * sum(sizes) * itemsize
    return workload_bytes + bytes_needed(group.optimizer, compared, sizes, itemsize)


def earlier_rows(path: Path, parser: argparse.ArgumentParser) -> pd.DataFrame:
    """The rows that an earlier run wrote."""
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(("version", "torch", "triton"), str))
    except ValueError as error:  # not a CSV, or empty
        parser.error(f"argument --resume: {path} is no table: {error}")
    if missing := set(COLUMNS) - set(table.columns):
        parser.error(f"argument --resume: {path} has no columns {', '.join(sorted(missing))}")
    return table.fillna({"triton": ""})


def is_measured(rows: pd.DataFrame, compared: Sequence[Provider]) -> bool:
    """Whether a group has a row of every implementation, in the versions that are here now.

    What takes too long to compile may be missing: it would be again.
    """
    same = (rows["torch"] == torch.__version__) & (rows["triton"] == triton_version())
    found = dict(zip(rows["implementation"], rows["version"], strict=True))
    return (
        bool(same.all())
        and {p.implementation: p.version for p in compared if not p.patience}.items()
        <= found.items()
    )


def belongs(table: pd.DataFrame, group: Group, device: torch.device) -> pd.Series[bool]:
    """Which rows are of a group, on this device with as many threads."""
    dtype = str(DTYPES[group.dtype]).removeprefix("torch.")
    return (
        (table["model"] == group.model)
        & (table["optimizer"] == group.optimizer)
        & (table["dtype"] == dtype)
        & (table["device"] == device_name(device))
        & (table["threads"] == torch.get_num_threads())
    )


if __name__ == "__main__":
    main()
