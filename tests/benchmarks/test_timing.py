"""Steps are timed as they run in training; the calls, with a clock that is made up."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from benchmarks.lib.timing import (
    CYCLES_PER_MS,
    LONGEST_MS,
    MARGIN,
    SHORTEST_MS,
    Timer,
    Turn,
    timer,
)

CUDA = torch.device("cuda")


class Machine:
    """A host and a GPU with clocks of their own, in ms; the GPU does one thing after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.host = self.gpu = 0.0
        self.cycles_per_ms = CYCLES_PER_MS / 2
        monkeypatch.setattr(torch.cuda, "Event", partial(Event, self))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr("time.perf_counter", lambda: self.host / 1e3)

    def synchronize(self, _: torch.device) -> None:
        self.calls.append("idle")
        self.host = self.gpu = max(self.host, self.gpu)

    def sleep(self, cycles: int) -> None:
        self.calls.append("wait")
        self.launch(cycles / self.cycles_per_ms)

    def launch(self, ms: float) -> None:
        self.gpu = max(self.host, self.gpu) + ms

    def turn(self, launches: int, host_ms: float, gpu_ms: float) -> Turn:
        """Something before a step, and a step of so many launches."""

        def prepare() -> None:
            self.calls.append("prepare")
            self.launch(0.2)

        def step() -> None:
            self.calls.append("step")
            for _ in range(launches):
                self.host += host_ms
                self.launch(gpu_ms)

        return prepare, step


class Event:
    def __init__(self, machine: Machine, enable_timing: bool) -> None:
        assert enable_timing
        self.machine, self.at = machine, math.nan

    def record(self) -> None:
        self.machine.calls.append("record")
        self.at = max(self.machine.host, self.machine.gpu)

    def synchronize(self) -> None:
        self.machine.synchronize(CUDA)

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def warm(turn: Turn) -> Timer:
    time_one = timer(CUDA)
    time_one.warm_up(*turn)
    return time_one


def test_a_step_is_timed_from_an_idle_gpu_and_behind_a_head_start(machine: Machine) -> None:
    turn = machine.turn(launches=3, host_ms=1.0, gpu_ms=0.5)
    time_one = warm(turn)
    machine.calls.clear()
    times = time_one(lambda: turn)
    alone, ahead = "prepare idle step idle", "prepare idle record wait record step record idle"
    assert machine.calls == [*alone.split(), *ahead.split()]
    assert times.host_ms == pytest.approx(3)
    assert times.alone_ms == pytest.approx(3.5)
    assert times.device_ms == pytest.approx(1.5)
    assert times.head_start_ms > times.host_ms


def test_many_launches_do_not_measure_the_host(machine: Machine) -> None:
    times = warm(machine.turn(5000, 0.01, 0.001))(lambda: machine.turn(5000, 0.01, 0.001))
    assert times.device_ms == pytest.approx(5)


def test_what_the_first_steps_compile_is_no_reason_to_wait(machine: Machine) -> None:
    time_one = warm(machine.turn(1, 60_000.0, 1.0))
    turn = machine.turn(1, 2.0, 1.0)
    time_one.warm_up(*turn)
    assert time_one(lambda: turn).head_start_ms < 10


def test_head_starts_go_by_the_clock_that_the_gpu_has(machine: Machine) -> None:
    turn = machine.turn(1, 2.0, 1.0)
    time_one = warm(turn)
    found = [time_one(lambda: turn).head_start_ms for _ in range(2)]
    # The clock is half of what is assumed at first.
    assert found == pytest.approx([2 * MARGIN * 2, MARGIN * 2])


def test_the_longest_step_of_the_host_counts(machine: Machine) -> None:
    time_one = warm(machine.turn(1, 4.0, 1.0))
    short, long = machine.turn(1, 2.0, 1.0), machine.turn(1, 8.0, 1.0)
    hosts = [4, 8, 8]
    machine.cycles_per_ms = CYCLES_PER_MS
    found = [time_one(lambda turn=turn: turn).head_start_ms for turn in (short, long, short)]  # type: ignore[misc]  # a default
    assert found == pytest.approx([MARGIN * host for host in hosts])


@pytest.mark.parametrize(("host_ms", "expected"), [(0.01, SHORTEST_MS), (1000.0, LONGEST_MS)])
def test_head_starts_have_limits(host_ms: float, expected: float, machine: Machine) -> None:
    turn = machine.turn(1, host_ms, 1.0)
    machine.cycles_per_ms = CYCLES_PER_MS
    times = warm(turn)(lambda: turn)
    assert times.head_start_ms == pytest.approx(expected)


def test_on_a_cpu_there_is_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls: list[str] = []
    turn = (partial(calls.append, "prepare"), partial(calls.append, "step"))
    times = timer(torch.device("cpu"))(lambda: turn)
    assert calls == ["prepare", "step"]
    assert times[:3] == (250, 250, 250)
    assert math.isnan(times.head_start_ms)
