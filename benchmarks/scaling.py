"""How step time grows with elements, number of tensors and unit length.

    python -m benchmarks.scaling [--device cpu] [--max-elements 1e8] [--plot] [--out ...]

Each row changes one of the three and leaves the others as they are. Its ratio is time per element
beside that of the row where overhead weighs least: most elements, fewest tensors, longest units.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import plots
from benchmarks.memory import bytes_needed, why_not
from benchmarks.providers import OPTIMIZERS, copy_provider, providers
from benchmarks.runner import COLUMNS, Rounds, device_name, measure
from benchmarks.shapes import on_device, workload_of

THREADS = 2
DTYPE = torch.float32
ROUNDS = Rounds(warmup=3, timed=15)
# What the other two are while one changes.
ELEMENTS, TENSORS, UNIT_LENGTH = 10**7, 10, 10**3
# Times the time per element of the reference row, up to which growth is called linear.
LINEAR = 1.15


class Case(NamedTuple):
    """Equal matrices: which of the numbers changes, and the three numbers."""

    axis: str
    elements: int
    tensors: int
    unit_length: int


def cases(largest: int) -> list[Case]:
    """Every case; the last one of each axis is what the others are held against."""
    elements = min(ELEMENTS, largest)
    sizes = [10**n for n in range(4, 12) if 10**n <= largest]
    all_cases = [
        *(Case("elements", size, TENSORS, UNIT_LENGTH) for size in sizes),
        *(Case("tensors", elements, n, UNIT_LENGTH) for n in (10_000, 1000, 100, 10, 1)),
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
    """Adds ns per element, and its ratio to that of the axis' last row."""
    per_element = 1e6 * table["median_ms"] / table["parameters"]
    reference = per_element.groupby(table["axis"], sort=False).transform("last")
    return table.assign(ns_per_element=per_element, ratio_to_linear=per_element / reference)


def verdict(rows: pd.DataFrame) -> str:
    """Where on an axis time per element is over ``LINEAR`` times its last row's."""
    axis = str(rows["axis"].iloc[0])
    values = rows["parameters" if axis == "elements" else axis].tolist()
    ratios = rows["ratio_to_linear"].tolist()
    beyond = [(value, ratio) for value, ratio in zip(values, ratios, strict=True) if ratio > LINEAR]
    reference = f"{axis}: {rows['ns_per_element'].iloc[-1]:.3g} ns per element at {values[-1]:,}"
    if not beyond:
        return f"{reference}; nowhere over {LINEAR:g} times that"
    listed = ", ".join(f"{ratio:.1f} times at {value:,}" for value, ratio in beyond)
    return f"{reference}; not linear where it is over {LINEAR:g} times that: {listed}"


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
    columns = ["axis", "unit_length", *COLUMNS, "ns_per_element", "ratio_to_linear"]
    table = with_ratios(pd.concat([row for row in found if row is not None], ignore_index=True))[
        columns
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    sizes = ["axis", "parameters", "tensors", "unit_length"]
    shown = [*sizes, "median_ms", "gb_per_s", "share_of_copy_bandwidth", *columns[-2:]]
    print(table[shown].to_string(index=False, float_format="{:.3f}".format))
    for _, rows in table.groupby("axis", sort=False):
        print(verdict(rows))
    print(f"on {device_name(device)}; every row is in {args.out}")
    if args.plot:
        for path in (plots.scaling(table, args.out), plots.bandwidth(table, args.out)):
            print(f"drawn in {path}")


if __name__ == "__main__":
    main()
