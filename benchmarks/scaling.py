"""How step time grows with elements, number of tensors and unit length.

    python -m benchmarks.scaling [--device cpu] [--max-elements 1e8] [--plot] [--out ...]

Each row changes one of the three and leaves the others as they are. Overhead is time per element
over that of the largest case; growth is what each element, or each tensor more, costs over the
least that it costs in a smaller case.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import growth, plots
from benchmarks.memory import bytes_needed, why_not
from benchmarks.providers import OPTIMIZERS, copy_provider, providers
from benchmarks.runner import COLUMNS, Rounds, device_name, measure
from benchmarks.shapes import on_device, workload_of

THREADS = 2
DTYPE = torch.float32
ROUNDS = Rounds(warmup=3, timed=15)
# What the other two are while one changes.
ELEMENTS, TENSORS, UNIT_LENGTH = 10**7, 10, 10**3
# Along these the elements are as many, and cost as much: what counts is the cost of each more.
MORE = ("tensors",)
# Columns beside those of all benchmarks.
KEYS = ["axis", "unit_length"]
RATIOS = [
    *("ns_per_element", "us_for_each_more"),
    *("ratio_to_largest", "ratio_to_cheapest_smaller"),
]


class Case(NamedTuple):
    """Equal matrices: which of the numbers changes, and the three numbers."""

    axis: str
    elements: int
    tensors: int
    unit_length: int


def cases(largest: int) -> list[Case]:
    """Every case, along each axis from small to large."""
    elements = min(ELEMENTS, largest)
    sizes = [10**n for n in range(4, 12) if 10**n <= largest]
    all_cases = [
        *(Case("elements", size, TENSORS, UNIT_LENGTH) for size in sizes),
        *(Case("tensors", elements, n, UNIT_LENGTH) for n in (1, 10, 100, 1000, 10_000)),
        # (n, 1) would be one unit, not n.
        *(
            Case("unit_length", elements, TENSORS, n)
            for n in (2, 10, 100, 10**3, 10**4, 10**5, 10**6)
        ),
    ]
    return [c for c in all_cases if c.elements >= c.tensors * c.unit_length]


def measure_case(case: Case, optimizer: str, device: torch.device) -> pd.DataFrame | None:
    """One row: what `measure` finds, and the case; None, with a message, where memory is short."""
    ours = next(p for p in providers(optimizer, device.type) if p.role == "ours" and p.quick)
    # What bandwidth is held against; it takes more memory than the step.
    compared = [ours, copy_provider(optimizer)] if case.axis == "unit_length" else [ours]
    sizes = [case.elements // case.tensors] * case.tensors
    workload_bytes = 2 * case.elements * DTYPE.itemsize
    needed = workload_bytes + bytes_needed(optimizer, compared, sizes, DTYPE.itemsize)
    if reason := why_not(needed, device):
        tqdm.write(f"{case.axis}, {case.elements:,} elements: left out, {reason}")
        return None
    shape = (case.elements // case.tensors // case.unit_length, case.unit_length)
    workload = on_device(workload_of(case.axis, [shape] * case.tensors, DTYPE), device)
    found = measure(optimizer, compared, workload, ROUNDS)
    return found[found["role"] == "ours"].assign(axis=case.axis, unit_length=case.unit_length)


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Adds what each element or tensor costs, beside the largest and the cheapest smaller case."""
    return pd.concat([_of_line(line) for _, line in table.groupby("axis", sort=False)])


def _of_line(line: pd.DataFrame) -> pd.DataFrame:
    ns = 1e6 * line["median_ms"] / line["parameters"]
    of_each_more = growth.of_each_more(1e3 * line["median_ms"], counts(line))
    more = str(line["axis"].iloc[0]) in MORE
    return line.assign(
        ns_per_element=ns,
        us_for_each_more=of_each_more if more else math.nan,
        ratio_to_largest=math.nan if more else ns / ns.iloc[-1],
        ratio_to_cheapest_smaller=growth.over_cheapest_smaller(of_each_more if more else ns),
    )


def counts(line: pd.DataFrame) -> pd.Series[int]:
    """What changes from row to row."""
    axis = str(line["axis"].iloc[0])
    return line["parameters" if axis == "elements" else axis]


def verdict(line: pd.DataFrame) -> str:
    """What each costs at an axis' end, where small cases cost more, and where larger ones do."""
    axis, end, last = str(line["axis"].iloc[0]), line.iloc[-1], counts(line).iloc[-1]
    grows = growth.verdict(line["ratio_to_cheapest_smaller"], counts(line))
    if axis in MORE:
        return f"{axis}: {end['us_for_each_more']:.3g} us for each more at {last:,}; {grows}"
    small = growth.listed(line["ratio_to_largest"], counts(line))
    overhead = f"overhead: {small}" if small else f"nowhere over {growth.LINEAR:g} times that"
    return f"{axis}: {end['ns_per_element']:.3g} ns per element at {last:,}; {overhead}; {grows}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case; print the table and what follows from it, write the CSV."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--max-elements", type=float, default=1e8, help="default: %(default)g")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/scaling.csv"))
    args = parser.parse_args(argv)

    torch.set_num_threads(THREADS)
    device, largest = torch.device(args.device), int(args.max_elements)
    in_turn = tqdm(cases(largest), desc="scaling", unit="case", disable=None)
    found = [measure_case(case, args.optimizer, device) for case in in_turn]
    columns = [*KEYS, *COLUMNS, *RATIOS]
    table = with_ratios(pd.concat([row for row in found if row is not None], ignore_index=True))[
        columns
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    sizes = ["axis", "parameters", "tensors", "unit_length"]
    shown = [*sizes, "median_ms", "gb_per_s", "share_of_copy_bandwidth", *RATIOS]
    print(table[shown].to_string(index=False, float_format="{:.3f}".format))
    for _, line in table.groupby("axis", sort=False):
        print(verdict(line))
    print(f"on {device_name(device)}; every row is in {args.out}")
    if args.plot:
        for path in (plots.scaling(table, args.out), plots.bandwidth(table, args.out)):
            print(f"drawn in {path}")


if __name__ == "__main__":
    main()
