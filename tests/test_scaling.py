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
    columns = ["axis", "unit_length", *COLUMNS, "ns_per_element", "ratio_to_linear"]
    assert list(table.columns) == columns
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


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        ([0.1, 0.2, 2.0], "elements: 1 ns per element at 2,000; nowhere over 1.15 times that"),
        (
            [0.4, 0.6, 2.0],
            "elements: 1 ns per element at 2,000; not linear where it is over 1.15 times that:"
            " 4.0 times at 100, 3.0 times at 200",
        ),
    ],
)
def test_verdict_names_what_is_not_linear(ms: list[float], expected: str) -> None:
    rows = pd.DataFrame({"axis": "elements", "parameters": [100, 200, 2000]})
    rows["median_ms"] = [x / 1e3 for x in ms]
    assert scaling.verdict(scaling.with_ratios(rows)) == expected
