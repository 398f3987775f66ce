"""Scaling reports say where growth stops being linear; nothing here is timed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import memory, scaling
from benchmarks.runner import COLUMNS, Rounds


def test_cases_change_one_number_each_and_fit() -> None:
    found = scaling.cases(10**8)
    defaults = {"elements": 10**7, "tensors": 10, "unit_length": 10**3}
    for case in found:
        fixed = {name: n for name, n in defaults.items() if name != case.axis}
        assert {name: getattr(case, name) for name in fixed} == fixed
        assert case.elements % (case.tensors * case.unit_length) == 0
    sizes = [case.elements for case in found if case.axis == "elements"]
    assert sizes == [10**n for n in range(4, 9)]
    assert {case.axis for case in found} == set(defaults)


def test_writes_and_draws_every_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "ROUNDS", Rounds(1, 2))
    monkeypatch.setattr(scaling, "THREADS", 1)
    out = tmp_path / "new" / "rows.csv"
    scaling.main(["--max-elements", "1e4", "--plot", "--out", str(out)])
    table = pd.read_csv(out)
    assert list(table.columns) == [*scaling.KEYS, *COLUMNS, *scaling.RATIOS]
    cases = scaling.cases(10**4)
    assert list(zip(table["axis"], table["tensors"], table["unit_length"], strict=True)) == [
        (case.axis, case.tensors, case.unit_length) for case in cases
    ]
    assert set(table["parameters"]) == {10**4}
    assert (table["units"] * table["unit_length"] == 10**4).all()
    printed = capsys.readouterr().out
    picture = out.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    bandwidth = out.with_name("rows-bandwidth.png")
    assert bandwidth.read_bytes().startswith(b"\x89PNG")
    for expected in ("elements:", "tensors:", "unit_length:", *map(str, (out, picture, bandwidth))):
        assert expected in printed
    assert set(table["role"]) == {"ours"}
    copied = table["share_of_copy_bandwidth"] > 0
    assert copied.tolist() == (table["axis"] == "unit_length").tolist()


def test_cases_that_memory_has_no_room_for_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = scaling.Case("elements", 10**9, 10, 1000)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 20 << 30)
    assert scaling.measure_case(case, "adamw", torch.device("cpu")) is None
    assert "elements, 1,000,000,000 elements: left out, it needs" in capsys.readouterr().out


def test_more_elements_than_by_default_are_measured_on_request() -> None:
    assert max(case.elements for case in scaling.cases(10**9)) == 10**9


def line_of(axis: str, counts: list[int], ms: list[float]) -> pd.DataFrame:
    """Rows of an axis as if measured."""
    line = pd.DataFrame({"axis": axis, "parameters": 10**6, "median_ms": ms})
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
    assert scaling.verdict(line) == f"elements: {expected}"


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
    assert scaling.verdict(line_of("tensors", TENSORS, ms)).startswith(f"tensors: {expected}")
