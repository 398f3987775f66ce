"""What compiles too long is left out; the alarm is rung by hand and the clock is made up."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pandas as pd
import pytest
from torch import Tensor

from benchmarks.lib.measure import Rounds, measure
from benchmarks.lib.patience import Patience, TooLong
from benchmarks.lib.providers import Provider, providers
from benchmarks.lib.timing import Step
from benchmarks.lib.workloads import workload_of
from tests.benchmarks.tiny import SHAPES


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_the_alarm_ends_what_takes_too_long() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TooLong), Patience(3600).limit():
        signal.raise_signal(signal.SIGALRM)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_it_is_no_exception_that_compilers_catch() -> None:
    assert not issubclass(TooLong, Exception)


@pytest.mark.parametrize("in_all", [1000, 250])
def test_all_together_have_so_much_time(in_all: float, clock: list[float]) -> None:
    patience = Patience(180, in_all)
    for _ in range(2):
        with patience.limit():
            seconds, again = signal.getitimer(signal.ITIMER_REAL)
            assert 0 < seconds <= 180
            assert again == 1
            clock[0] += 150
    assert patience.left == in_all - 300
    if patience.left > 0:
        with patience.limit():
            return
    with pytest.raises(TooLong), patience.limit():
        pytest.fail("there was no time left")


def slow(at_once: bool) -> Callable[[list[Tensor]], Step]:
    def build(_: list[Tensor]) -> Step:
        steps = iter([] if at_once else [None])

        def step() -> None:
            if next(steps, "late") == "late":
                signal.raise_signal(signal.SIGALRM)

        return step

    return build


@pytest.mark.parametrize("at_once", [True, False], ids=["first step", "second step"])
def test_what_compiles_too_long_is_left_out_and_the_rest_measured(
    at_once: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped: list[None] = []
    monkeypatch.setattr("benchmarks.lib.measure.stop_compilers", lambda: stopped.append(None))
    quick = [p for p in providers("adamw") if p.quick]
    late = Provider("slow AGC", "", "peer", True, slow(at_once), Patience(3600))
    in_time = quick[0]._replace(implementation="in time", patience=Patience(3600))
    rows = measure("adamw", [late, in_time, *quick], workload_of("tiny", SHAPES), Rounds(1, 1))
    assert rows["implementation"].tolist() == ["in time", *(p.implementation for p in quick)]
    kept = rows.set_index("implementation")["kept_extra_bytes"]
    assert kept["in time"] == kept[quick[0].implementation]
    assert not pd.isna(rows["device_ms"]).any()
    assert len(stopped) == 1
    assert "adamw, slow AGC: left out, it compiles too long" in capsys.readouterr().out
