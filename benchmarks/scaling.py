"""How step time grows with elements, tensors, unit length and parameter groups.

    python -m benchmarks.scaling [--device cpu] [--max-elements 1e9] [--plot] [--out ...]

Each case changes one of them and leaves the others as they are. All take turns in several passes,
whose rounds are pooled. Overhead is time per element over that of the largest case; growth is what
each element, or each tensor or group more, costs over the least that it costs in a smaller case.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.lib import growth, plots
from benchmarks.lib.arguments import check_file, device, parser_of
from benchmarks.lib.copying import copy_provider
from benchmarks.lib.machine import device_name
from benchmarks.lib.measure import Rounds, time_steps
from benchmarks.lib.memory_limits import bytes_needed, why_not
from benchmarks.lib.optimizers import LR, OPTIMIZERS
from benchmarks.lib.providers import Provider, providers
from benchmarks.lib.rows import COLUMNS, summarize, write
from benchmarks.lib.timing import Step
from benchmarks.lib.workloads import workload_of

THREADS = 2
DTYPE = torch.float32
PASSES = 5
ROUNDS = Rounds(warmup=3, timed=4)  # in each pass
ROLES = ("ours", "unclipped")
# What the others are while one changes; groups are made of small tensors.
ELEMENTS, TENSORS, UNIT_LENGTH = 10**7, 10, 10**3
GROUPED_ELEMENTS, GROUPED_TENSORS, GROUPED_LENGTH = 60_000, 600, 10
# Along these the elements are as many, and cost as much: what counts is the cost of each more.
MORE = ("tensors", "groups")
# Columns beside those of all benchmarks.
KEYS = ["axis", "unit_length", "groups"]
RATIOS = [
    *("ns_per_element", "us_for_each_more"),
    *("ratio_to_largest", "ratio_to_cheapest_smaller"),
]
SHOWN = [
    *("axis", "implementation", "parameters", "tensors", "unit_length", "groups"),
    *("device_ms", "gb_per_s", "share_of_copy_bandwidth", *RATIOS),
]


class Case(NamedTuple):
    """Equal matrices: elements of all, how many they are, elements per unit, and groups."""

    elements: int
    tensors: int
    unit_length: int
    groups: int = 1


def axes(largest: int) -> dict[str, list[Case]]:
    """The cases along each axis, from small to large."""
    elements = min(ELEMENTS, largest)
    sizes = [10**n for n in range(4, 12) if 10**n <= largest]
    # (n, 1) would be one unit, not n.
    lengths = (2, 10, 100, 10**3, 10**4, 10**5, 10**6)
    grouped = Case(GROUPED_ELEMENTS, GROUPED_TENSORS, GROUPED_LENGTH)
    found = {
        "elements": [Case(size, TENSORS, UNIT_LENGTH) for size in sizes],
        "tensors": [Case(elements, n, UNIT_LENGTH) for n in (1, 10, 100, 1000, 10_000)],
        "unit_length": [Case(elements, TENSORS, n) for n in lengths],
        "groups": [grouped._replace(groups=n) for n in (1, 10, 50, 100, 300)],
    }
    return {
        axis: [c for c in cases if c.tensors * c.unit_length <= c.elements <= largest]
        for axis, cases in found.items()
    }


def elements(text: str) -> float:
    """How many elements, of which no case has fewer than 10,000."""
    number = float(text)
    if not 1e4 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number from 10,000 on")
    return number


def in_turns(cases: Sequence[Case]) -> list[Case]:
    """All cases in every pass, in a new order each time, so that drift of the machine hits all."""
    order = random.Random(0)
    return [case for _ in range(PASSES) for case in order.sample(cases, len(cases))]


def compared(optimizer: str, device: torch.device, groups: int = 1) -> list[Provider]:
    """Ours, torch's update without clipping, and a copy, which bandwidth is held against."""
    quick = [p for p in providers(optimizer, device.type) if p.quick]
    ours, unclipped = (next(p for p in quick if p.role == role) for role in ROLES)
    return [in_groups(ours, groups), in_groups(unclipped, groups), copy_provider(optimizer)]


def in_groups(provider: Provider, count: int) -> Provider:
    """The provider with parameters dealt out to groups, which differ in their learning rate."""

    def build(params: list[Tensor]) -> Step:
        dealt: Any = [{"params": params[i::count], "lr": (1 + i) * LR} for i in range(count)]
        return provider.build(dealt)

    return provider._replace(build=build)


def fits(case: Case, optimizer: str, device: torch.device) -> bool:
    """Whether memory has room for a case; says so where it has not."""
    sizes = [case.elements // case.tensors] * case.tensors
    workload_bytes = 2 * case.elements * DTYPE.itemsize
    needed = bytes_needed(optimizer, compared(optimizer, device), sizes, DTYPE.itemsize)
    reason = why_not(workload_bytes + needed, device)
    if reason:
        tqdm.write(f"{case.elements:,} elements in {case.tensors:,} tensors: left out, {reason}")
    return reason is None


def time_case(case: Case, optimizer: str, device: torch.device) -> pd.DataFrame:
    """Steps on matrices made for it: no two of the large cases fit in memory together."""
    gc.collect()  # a process' first steps leave cycles that hold parameters
    shape = (case.elements // case.tensors // case.unit_length, case.unit_length)
    workload = workload_of("equal matrices", [shape] * case.tensors, DTYPE, device=device)
    return time_steps(optimizer, compared(optimizer, device, case.groups), workload, ROUNDS)


def tabulate(lines: dict[str, list[Case]], found: dict[Case, pd.DataFrame]) -> pd.DataFrame:
    """The rows of every axis, of the cases that were measured."""
    rows = [
        found[case].assign(axis=axis, unit_length=case.unit_length, groups=case.groups)
        for axis, cases in lines.items()
        for case in cases
        if case in found
    ]
    table = pd.concat(rows, ignore_index=True)
    return with_ratios(table[table["role"].isin(ROLES)])[[*KEYS, *COLUMNS, *RATIOS]]


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Adds what each element or tensor costs, beside the largest and the cheapest smaller case."""
    return pd.concat([_of_line(line) for _, line in table.groupby(["axis", "role"], sort=False)])


def _of_line(line: pd.DataFrame) -> pd.DataFrame:
    ns = 1e6 * line["device_ms"] / line["parameters"]
    of_each_more = growth.of_each_more(1e3 * line["device_ms"], counts(line))
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
    title = f"{axis}, {end['implementation']}"
    grows = growth.verdict(line["ratio_to_cheapest_smaller"], counts(line))
    if axis in MORE:
        return f"{title}: {end['us_for_each_more']:.3g} us for each more at {last:,}; {grows}"
    small = growth.listed(line["ratio_to_largest"], counts(line))
    overhead = f"overhead: {small}" if small else f"nowhere over {growth.LINEAR:g} times that"
    return f"{title}: {end['ns_per_element']:.3g} ns per element at {last:,}; {overhead}; {grows}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case; print the table and what follows from it, write the CSV."""
    parser = parser_of("scaling", __doc__)
    parser.add_argument("--device", type=device, choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--max-elements", type=elements, default=1e9, help="default: %(default)g")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/scaling.csv"))
    args = parser.parse_args(argv)
    check_file(parser, args.out)
    torch.set_num_threads(THREADS)
    on, lines = torch.device(args.device), axes(int(args.max_elements))
    distinct = dict.fromkeys(case for line in lines.values() for case in line)
    possible = [case for case in distinct if fits(case, args.optimizer, on)]
    if not possible:
        parser.error("memory has no room for any case")
    steps: defaultdict[Case, pd.DataFrame] = defaultdict(pd.DataFrame)
    found = {}
    for case in tqdm(in_turns(possible), desc="scaling", unit="case", disable=None):
        new = time_case(case, args.optimizer, on)
        steps[case] = pd.concat([steps[case], new], ignore_index=True)
        found[case] = summarize(steps[case])
        table = tabulate(lines, found)
        write(table, args.out)
    print(table[SHOWN].to_string(index=False, float_format="{:.3f}".format))
    for _, line in table.groupby(["axis", "role"], sort=False):
        print(verdict(line))
    print(f"on {device_name(on)}; every row is in {args.out}")
    if args.plot:
        for path in (plots.scaling(table, args.out), plots.bandwidth(table, args.out)):
            print(f"drawn in {path}")


if __name__ == "__main__":
    main()
