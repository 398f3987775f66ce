"""One step of the torch path on NFNet-F0's parameters with blocks of several sizes.

    python -m benchmarks.tune_blocks [--quick] [--optimizers ...] [--out out/tune_blocks.csv]

BLOCK in agc_triton/torch_path/blocks.py is chosen from what it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

from agc_triton.torch_path import blocks
from benchmarks.lib.arguments import check_file, parser_of
from benchmarks.lib.measure import Rounds, measure
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.providers import Provider, providers
from benchmarks.lib.rows import COLUMNS, write
from benchmarks.lib.timing import Step
from benchmarks.lib.workloads import Workload, random_workload

MODEL = "dm_nfnet_f0"
DEFAULT = ("sgd", "adamw", "rmsprop")  # Adam differs from AdamW in its decay only
THREADS = 2
BLOCKS = [1 << 17, 1 << 18, 1 << 19, 3 << 18, 1 << 20, 3 << 19, 1 << 21]
SHOWN = [
    *("optimizer", "implementation", "device_ms", "p20_ms", "p80_ms"),
    *("ratio_to_unclipped", "peak_extra_share", "share_of_units_clipped"),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and the fastest size, write the CSV."""
    parser = parser_of("tune_blocks", __doc__)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(DEFAULT))
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=Path("out/tune_blocks.csv"))
    args = parser.parse_args(argv)
    check_file(parser, args.out)
    torch.set_num_threads(THREADS)
    workload = random_workload(MODEL)
    rounds = Rounds(warmup=1, timed=5) if args.quick else Rounds(warmup=3, timed=20)
    tables = [sweep(optimizer, workload, rounds) for optimizer in args.optimizers]
    table = pd.concat(tables, ignore_index=True)
    write(table[[*COLUMNS, "block"]], args.out)
    print(table[SHOWN].to_string(index=False, float_format="{:.3f}".format))
    for optimizer, rows in table.groupby("optimizer", sort=False):
        print(f"{optimizer}: {verdict(rows)}")
    print(f"written to {args.out}")


def sweep(optimizer: str, workload: Workload, rounds: Rounds) -> pd.DataFrame:
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


def verdict(rows: pd.DataFrame) -> str:
    """The fastest size, and the one that is in use."""
    best: pd.Series[Any] = rows[rows["role"] == "ours"].nsmallest(1, "device_ms").iloc[0]
    return (
        f"fastest with BLOCK = {best['block']} ({best['device_ms']:.0f} ms);"
        f" blocks.py has {blocks.BLOCK}"
    )


if __name__ == "__main__":
    main()
