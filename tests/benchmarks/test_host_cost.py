"""Host cost reports compare what they say they compare; nothing here is timed."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from benchmarks import host_cost
from benchmarks.host_cost import (
    CACHES,
    COLUMNS,
    FLOOR,
    KINDS,
    OURS,
    SHARDED,
    THEIRS,
    TRACKED,
    TURN,
)
from benchmarks.lib import plots

ROOT = Path(__file__).parents[2]


def test_a_short_run_writes_and_draws_every_row(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.csv"
    # In a process of its own, as it interprets kernels where there is a GPU too.
    command = ["benchmarks.host_cost", "--quick", "--calls", "2", "--plot", "--out", str(out)]
    command += ["--optimizers", "NAdam"]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = pd.read_csv(out)
    assert list(table.columns) == COLUMNS
    keys = ["tensors", "groups", "kind", "caches", "implementation"]
    expected = [
        (*case, kind, caches, name)
        for case in host_cost.cases(quick=True)
        for kind in KINDS
        for caches in CACHES
        for name in ("NAdam_AGC triton", OURS, TRACKED, THEIRS, SHARDED, FLOOR)
    ]
    assert list(table[keys].itertuples(index=False, name=None)) == expected
    assert (table["p20_us"] <= table["median_us"]).all()
    assert (table["median_us"] <= table["p80_us"]).all()
    per_tensor = table["median_us"] / table["tensors"]
    pd.testing.assert_series_equal(table["us_per_tensor"], per_tensor, check_names=False)
    rows = {name: of.reset_index() for name, of in table.groupby("implementation")}
    for of_one in rows.values():
        ratio = rows[THEIRS]["median_us"] / of_one["median_us"]
        pd.testing.assert_series_equal(of_one["times_cheaper_than_torch"], ratio, check_names=False)
    assert set(table["torch"]) == {torch.__version__}
    picture = out.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for text in (str(out), str(picture), "tensors, steady, warm caches,", "groups, changing, cold"):
        assert text in done.stdout


def test_a_killed_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_mesh: Any, tensors: int, *_: int) -> list[dict[str, Any]]:
        if tensors != host_cost.TENSORS[0]:
            raise KeyboardInterrupt
        return [dict.fromkeys(COLUMNS, tensors)]

    monkeypatch.setattr(host_cost, "measure", measure)
    out = tmp_path / "cost.csv"
    with pytest.raises(KeyboardInterrupt):
        host_cost.main(["--out", str(out)])
    assert pd.read_csv(out)["tensors"].tolist() == [host_cost.TENSORS[0]]


def test_the_floor_reads_every_address() -> None:
    optimizer = host_cost.build(host_cost.AddressesOnly, host_cost.plain(3), 2, fused=True)
    optimizer.step()
    optimizer.step()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    assert isinstance(optimizer, host_cost.AddressesOnly)
    expected = [params, [p.grad for p in params]]
    expected += [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
    assert optimizer.addresses == [[t.data_ptr() for t in role] for role in expected]


class Recorder:
    """Writes down its name, learning rate and gradient whenever it steps."""

    def __init__(self, name: str, log: list[tuple[str, float, Tensor | None]]) -> None:
        built = host_cost.build(torch.optim.SGD, host_cost.plain(1), 1, lr=1.0)
        self.param_groups = built.param_groups
        self.name, self.log = name, log

    def step(self) -> None:
        group = self.param_groups[0]
        self.log.append((self.name, group["lr"], group["params"][0].grad))


@pytest.mark.parametrize(("calls", "rounds"), [(2, 2), (TURN, 2), (5 * TURN + 1, 7)])
def test_implementations_kinds_and_caches_take_turns(calls: int, rounds: int) -> None:
    log: list[tuple[str, float, Tensor | None]] = []
    optimizers: dict[str, Any] = {name: Recorder(name, log) for name in "ab"}
    times = host_cost.time_in_turns(optimizers, calls)
    names = "".join(name for name, _, _ in log)
    turn = min(calls, TURN)
    turns = [names[i : i + 2 * turn] for i in range(0, len(names), 2 * turn)]
    by_round = [tuple(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert len(by_round) == rounds
    warm, cold = "a" * turn + "b" * turn, "ab" * turn
    assert all(sorted(one) == [warm, warm, cold, cold] for one in by_round)
    assert rounds == 2 or len(set(by_round)) > 1
    found = {key: len(values) for key, values in times.items()}
    assert found == dict.fromkeys(product("ab", KINDS, CACHES), (rounds - 1) * turn)


def test_everything_moves_before_a_changing_step_and_nothing_before_a_steady_one() -> None:
    log: list[tuple[str, float, Tensor | None]] = []
    optimizer: Any = Recorder("a", log)
    for kind, expected in (("steady", 1), ("changing", 5)):
        log.clear()
        assert len(host_cost.time_block(optimizer, kind, 5)) == len(log) == 5
        assert len({lr for _, lr, _ in log}) == len({id(grad) for *_, grad in log}) == expected


def test_tensors_are_dealt_out_to_groups() -> None:
    optimizer = host_cost.build(torch.optim.AdamW, host_cost.plain(10), 3, lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 3, 3]
    assert len({group["weight_decay"] for group in optimizer.param_groups}) == 3


def table_of(costs: dict[tuple[int, int], float]) -> pd.DataFrame:
    """Rows of ours as if measured: microseconds by tensors and groups; torch's cost nothing."""
    rows = [
        {"implementation": name, "kind": kind, "caches": caches, "tensors": n, "groups": groups}
        | {"median_us": us, "p20_us": 0.9 * us, "p80_us": 1.2 * us}
        for (n, groups), cost in costs.items()
        for name, us in ((OURS, cost), (THEIRS, 1e-3))
        for kind in KINDS
        for caches in CACHES
    ]
    return pd.DataFrame(rows).assign(device="Some CPU")


LINEAR = {(30, 1): 40.0, (60, 1): 70.0, (600, 1): 610.0, (600, 10): 700.0, (600, 300): 3600.0}


def test_growth_is_linear_where_each_costs_no_more() -> None:
    lines = host_cost.verdicts(table_of(LINEAR))
    expected = [
        f"{axis}, {kind}, {caches} caches, {OURS}: {each}; grows no faster than linearly"
        for axis, each in (
            ("tensors", "1.02 us per tensor at 600"),
            ("groups", "10 us per group more at 300"),
        )
        for kind in KINDS
        for caches in CACHES
    ]
    assert lines[::2] == expected
    assert all(THEIRS in line and "no faster" in line for line in lines[1::2])


def test_growth_names_where_each_costs_more() -> None:
    quadratic = {(n, groups): n**2 / 30 + 40 * groups**2 for n, groups in LINEAR}
    lines = host_cost.verdicts(table_of(quadratic))
    for line, expected in (
        (lines[0], "20.1 us per tensor at 600; over 1.15 times what fewer cost each: 8.60 times"),
        (lines[8], "1.2e+04 us per group more at 300; over 1.15 times what fewer cost each: 27.36"),
    ):
        assert expected in line
    assert all("no faster" in line for line in lines[1::2])


def test_costs_are_drawn(tmp_path: Path) -> None:
    path = plots.host_cost(table_of(LINEAR), tmp_path / "cost.csv")
    assert path == tmp_path / "cost.png"
    assert path.read_bytes().startswith(b"\x89PNG")
