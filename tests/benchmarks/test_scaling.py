"""Scaling reports say where growth stops being linear; nothing here is timed."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import scaling
from benchmarks.lib import memory_limits
from benchmarks.lib.measure import Rounds
from benchmarks.lib.rotation import Rotation
from benchmarks.lib.rows import COLUMNS, summarize
from benchmarks.lib.workloads import workload_of


def test_cases_change_one_number_each_and_fit() -> None:
    lines = scaling.axes(10**8)
    shared = scaling.Case(elements=10**7, tensors=10, unit_length=10**3, groups=1)
    assert set(lines) == set(shared._fields)
    for axis, cases in lines.items():
        common = cases[0] if axis == "groups" else shared
        assert common in cases
        numbers = [getattr(case, axis) for case in cases]
        assert cases == [common._replace(**{axis: n}) for n in sorted(set(numbers))]
        assert all(case.elements % (case.tensors * case.unit_length) == 0 for case in cases)
    assert [case.elements for case in lines["elements"]] == [10**n for n in range(4, 9)]


def test_every_case_has_a_turn_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PASSES", 3)
    cases = scaling.axes(10**7)["unit_length"]
    turns = scaling.in_turns(cases)
    passes = [turns[i : i + len(cases)] for i in range(0, len(turns), len(cases))]
    assert [set(one) for one in passes] == [set(cases)] * 3
    assert len(set(map(tuple, passes))) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_parameters_are_dealt_out_to_groups(count: int) -> None:
    workload = workload_of("tiny", [(2, 2)] * 7)
    sizes = {1: [7], 3: [2, 2, 3]}
    rotation = Rotation(scaling.compared("adamw", torch.device("cpu"), count), workload, 1)
    for (step,) in rotation.steps[:2]:
        groups = step.__self__.param_groups  # type: ignore[attr-defined]  # an optimizer's method
        assert sorted(len(group["params"]) for group in groups) == sizes[count]
        assert len({group["lr"] for group in groups}) == count


def test_writes_and_draws_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[scaling.Case] = []

    def time_case(case: scaling.Case, *args: Any) -> pd.DataFrame:
        measured.append(case)
        return original(case, *args)

    original = scaling.time_case
    monkeypatch.setattr(scaling, "time_case", time_case)
    monkeypatch.setattr(gc, "collect", int)  # of all that tests have left behind
    monkeypatch.setattr(scaling, "PASSES", 2)
    monkeypatch.setattr(scaling, "ROUNDS", Rounds(1, 1))
    monkeypatch.setattr(scaling, "THREADS", 1)
    monkeypatch.setattr(scaling, "GROUPED_ELEMENTS", 3_000)
    monkeypatch.setattr(scaling, "GROUPED_TENSORS", 300)
    out = tmp_path / "new" / "rows.csv"
    scaling.main(["--max-elements", "1e5", "--plot", "--out", str(out)])
    table = pd.read_csv(out)
    assert list(table.columns) == [*scaling.KEYS, *COLUMNS, *scaling.RATIOS]
    lines = scaling.axes(10**5)
    rows = table[["axis", "role", "parameters", "tensors", "unit_length", "groups"]]
    assert list(rows.itertuples(index=False, name=None)) == [
        (axis, role, *case)
        for axis, cases in lines.items()
        for role in scaling.ROLES
        for case in cases
    ]
    assert (table["units"] * table["unit_length"] == table["parameters"]).all()
    assert (table["share_of_copy_bandwidth"] > 0).all()

    assert Counter(measured) == dict.fromkeys({c for cases in lines.values() for c in cases}, 2)
    assert set(table["rounds"]) == {2}
    shared = table[
        table[["parameters", "tensors", "unit_length"]].eq([10**5, 10, 1000]).all(axis=1)
    ]
    assert len(shared) == 3 * len(scaling.ROLES)
    assert shared["device_ms"].nunique() == len(scaling.ROLES)

    printed = capsys.readouterr().out
    pictures = [out.with_suffix(".png"), out.with_name("rows-bandwidth.png")]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    starts = [f"{axis}, {name}: " for axis in lines for name in set(table["implementation"])]
    assert all(expected in printed for expected in (*starts, str(out), *map(str, pictures)))


def test_a_killed_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[scaling.Case] = []

    def time_case(case: scaling.Case, *args: Any) -> pd.DataFrame:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return original(case, *args)

    original = scaling.time_case
    monkeypatch.setattr(scaling, "time_case", time_case)
    monkeypatch.setattr(scaling, "ROUNDS", Rounds(1, 2))
    monkeypatch.setattr(scaling, "THREADS", 1)
    out = tmp_path / "rows.csv"
    with pytest.raises(KeyboardInterrupt):
        scaling.main(["--max-elements", "1e4", "--out", str(out)])
    kept = pd.read_csv(out)[["parameters", "tensors", "unit_length", "groups"]]
    assert set(kept.itertuples(index=False, name=None)) == set(measured)


def test_rounds_of_all_passes_count() -> None:
    found = ["rounds", "device_ms", "p20_ms", "p80_ms"]
    common = {"implementation": "x", "role": "ours", "bytes_moved": 28}
    steps = pd.DataFrame([{**common, "device_ms": ms, "host_ms": ms} for ms in range(1, 12)])
    given = [name for name in COLUMNS if name not in ("rounds", "p20_ms", "p80_ms")]
    row = summarize(steps.reindex(columns=given)).iloc[0]
    assert row[found].tolist() == [11, 6, 3, 9]


def test_cases_that_memory_has_no_room_for_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = scaling.Case(10**9, 10, 1000)
    monkeypatch.setattr(memory_limits, "free_bytes", lambda _: 20 << 30)
    assert not scaling.fits(case, "adamw", torch.device("cpu"))
    assert "1,000,000,000 elements in 10 tensors: left out, it needs" in capsys.readouterr().out
    assert scaling.fits(case._replace(elements=10**8), "adamw", torch.device("cpu"))


def test_every_case_up_to_a_billion_elements_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_limits, "free_bytes", lambda _: 0)
    monkeypatch.setattr(scaling, "THREADS", 1)
    with pytest.raises(SystemExit):
        scaling.main(["--out", str(tmp_path / "rows.csv")])
    printed = capsys.readouterr()
    assert printed.out.count("1,000,000,000 elements in 10 tensors: left out") == 1
    # Seven unit lengths, one of which is on the other axes too.
    assert printed.out.count("10,000,000 elements in 10 tensors: left out") == 7
    assert "memory has no room for any case" in printed.err


def line_of(axis: str, counts: list[int], ms: list[float]) -> pd.DataFrame:
    """Rows of an axis as if measured."""
    common = {"axis": axis, "role": "ours", "implementation": "x", "parameters": 10**6}
    line = pd.DataFrame({**common, "device_ms": ms})
    return scaling.with_ratios(
        line.assign(**{"parameters" if axis == "elements" else axis: counts})
    )


SIZES = [10**n for n in range(4, 10)]


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (
            [1e-6 * n for n in SIZES],
            "1 ns per element at 1,000,000,000; nowhere over 1.15 times that;"
            " grows no faster than linearly",
        ),
        (
            [1e-6 * n + 0.02 for n in SIZES],
            "1 ns per element at 1,000,000,000; overhead: 3.00 times at 10,000,"
            " 1.20 times at 100,000; grows no faster than linearly",
        ),
        (
            [1e-6 * n for n in SIZES[:-2]] + [120.0, 1440.0],
            "1.44 ns per element at 1,000,000,000; nowhere over 1.15 times that;"
            " over 1.15 times what fewer cost each: 1.20 times at 100,000,000,"
            " 1.44 times at 1,000,000,000",
        ),
        (
            [1e-8 * n**1.3 for n in SIZES[:3]],
            "0.631 ns per element at 1,000,000; nowhere over 1.15 times that;"
            " over 1.15 times what fewer cost each: 2.00 times at 100,000, 3.98 times at 1,000,000",
        ),
    ],
)
def test_overhead_and_growth_by_elements(ms: list[float], expected: str) -> None:
    line = line_of("elements", SIZES[: len(ms)], ms)
    assert scaling.verdict(line) == f"elements, x: {expected}"


TENSORS = [1, 10, 100, 1000, 10_000]


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        ([20 + 0.005 * n for n in TENSORS], "5 us for each more at 10,000; grows no faster"),
        ([20.0] * 5, "0.3 us for each more at 10,000; grows no faster"),  # 0.15 * 20 ms at most
        ([20 * n**0.3 for n in TENSORS], "29.7 us for each more at 10,000; grows no faster"),
        ([20.0, 19.0, 19.5, 20.5, 120.0], "10 us for each more at 10,000; over 1.15 times what"),
        (
            [20 + 5e-6 * n**2 for n in TENSORS],
            "50 us for each more at 10,000; over 1.15 times what fewer cost each: 9.99 times at",
        ),
    ],
)
def test_growth_by_tensors_is_told_by_what_each_more_costs(ms: list[float], expected: str) -> None:
    assert scaling.verdict(line_of("tensors", TENSORS, ms)).startswith(f"tensors, x: {expected}")
