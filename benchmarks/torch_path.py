"""One step of the torch path on NFNet-F0's parameters, beside timm's AGC and torch.optim.

python -m benchmarks.torch_path            every implementation
python -m benchmarks.torch_path --quick    the most telling ones, in half a minute
python -m benchmarks.torch_path --sweep    what BLOCK in torch_path/blocks.py is chosen from
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

from agc_triton.torch_path import blocks
from benchmarks.arguments import check_file
from benchmarks.providers import OPTIMIZERS, Provider, Role, providers
from benchmarks.runner import COLUMNS, Rounds, measure, write
from benchmarks.shapes import Workload, random_workload
from benchmarks.timing import Step

MODEL = "dm_nfnet_f0"
DEFAULT = ("sgd", "adamw", "rmsprop")  # Adam differs from AdamW in its decay only
THREADS = 2
BLOCKS = [1 << 17, 1 << 18, 1 << 19, 3 << 18, 1 << 20, 3 << 19, 1 << 21]
SHOWN = [
    *("optimizer", "implementation", "median_ms", "p20_ms", "p80_ms"),
    *("ratio_to_unclipped", "ratio_to_best_peer", "peak_extra_share", "share_of_units_clipped"),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and what follows from it, write the CSV."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torch_path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(DEFAULT))
    parser.add_argument("--quick", action="store_true", help="fewer rounds and implementations")
    parser.add_argument("--sweep", action="store_true", help="block sizes instead of peers")
    parser.add_argument("--out", type=Path, help="default: out/torch_path[_sweep].csv")
    args = parser.parse_args(argv)
    out = args.out or Path("out", "torch_path_sweep.csv" if args.sweep else "torch_path.csv")
    check_file(parser, out)

    torch.set_num_threads(THREADS)
    workload = random_workload(MODEL)
    rounds = Rounds(warmup=1, timed=5) if args.quick else Rounds(warmup=3, timed=20)
    tables = []
    for optimizer in args.optimizers:
        if args.sweep:
            tables.append(_sweep(optimizer, workload, rounds))
        else:
            compared = [p for p in providers(optimizer) if p.quick or not args.quick]
            tables.append(measure(optimizer, compared, workload, rounds))
    table = pd.concat(tables, ignore_index=True)

    shown = table[SHOWN].dropna(axis="columns", how="all")
    print(shown.to_string(index=False, float_format="{:.3f}".format))
    for optimizer in args.optimizers:
        rows = table[table["optimizer"] == optimizer]
        print(f"{optimizer}: {_fastest_block(rows) if args.sweep else _speed_up(rows)}")
    write(table[[*COLUMNS, "block"] if args.sweep else COLUMNS], out)
    print(f"written to {out}")


def _sweep(optimizer: str, workload: Workload, rounds: Rounds) -> pd.DataFrame:
    """Ours with every block size, and torch.optim without clipping to hold it against."""
    known = [p for p in providers(optimizer) if p.quick]
    (ours,) = (p for p in known if p.role == "ours")
    (unclipped,) = (p for p in known if p.role == "unclipped")
    table = measure(
        optimizer, [unclipped, *(with_block(ours, block) for block in BLOCKS)], workload, rounds
    )
    return table.assign(block=pd.array([None, *BLOCKS], dtype="Int64"))


def with_block(provider: Provider, block: int) -> Provider:
    """The provider with ``blocks.BLOCK`` replaced while it makes a step."""

    def build(params: list[Tensor]) -> Step:
        step = provider.build(params)

        def step_with_block() -> None:
            with mock.patch.object(blocks, "BLOCK", block):
                step()

        return step_with_block

    return provider._replace(
        implementation=f"{provider.implementation}, BLOCK = {block}", build=build
    )


def _speed_up(rows: pd.DataFrame) -> str:
    ours, peer = _fastest(rows, "ours"), _fastest(rows, "peer")
    return (
        f"{ours['implementation']} takes {ours['median_ms']:.0f} ms a step,"
        f" {ours['ratio_to_best_peer']:.2f} times as fast as {peer['implementation']}"
        f" ({peer['median_ms']:.0f} ms), {ours['ratio_to_unclipped']:.2f} times the unclipped step;"
        f" peak extra memory {ours['peak_extra_share']:.1%} of the parameters"
    )


def _fastest_block(rows: pd.DataFrame) -> str:
    best = _fastest(rows, "ours")
    return (
        f"fastest with BLOCK = {best['block']} ({best['median_ms']:.0f} ms);"
        f" blocks.py has {blocks.BLOCK}"
    )


def _fastest(rows: pd.DataFrame, role: Role) -> pd.Series[Any]:
    return rows[rows["role"] == role].sort_values("median_ms").iloc[0]


if __name__ == "__main__":
    main()
