"""How long one step takes, on a CPU or a CUDA device, behind one interface."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

Step = Callable[[], object]
# What makes ready for a step and is not timed, and the step.
Turn = tuple[Step, Step]


class Times(NamedTuple):
    """Milliseconds of one step; on a CPU the first three are one.

    device_ms: what the device is busy for, issued ahead. host_ms: until ``step()`` returns.
    alone_ms: from an idle device until it is done. head_start_ms: how long the device was kept
    waiting while the step was issued; where host_ms is longer, device_ms may hold some of it.
    """

    device_ms: float
    host_ms: float
    alone_ms: float
    head_start_ms: float


class Timer(Protocol):
    """Times the steps of one implementation."""

    def warm_up(self, prepare: Step, step: Step) -> None:
        """Make a step that does not count; the last of them tells what a step takes."""

    def __call__(self, turn: Callable[[], Turn]) -> Times:
        """Time a step, or one for each way of timing."""


def timer(device: torch.device) -> Timer:
    """A timer for one implementation on a device."""
    return _CudaTimer(device) if device.type == "cuda" else _CpuTimer()


class _CpuTimer:
    def warm_up(self, prepare: Step, step: Step) -> None:
        prepare()
        step()

    def __call__(self, turn: Callable[[], Turn]) -> Times:
        prepare, step = turn()
        prepare()
        start = time.perf_counter()
        step()
        ms = _ms_since(start)
        return Times(ms, ms, ms, math.nan)


# Head starts: times the host's longest step so far, within limits.
MARGIN = 1.3
SHORTEST_MS, LONGEST_MS = 1.0, 500.0
# More than GPUs have, lest the first head start be too short; later ones go by what it measured.
CYCLES_PER_MS = 2_000_000.0


class _CudaTimer:
    """Times a step by the clock from an idle device, and another by events behind a head start.

    A kernel that only waits is still running while ``step()`` is called, as backward passes are in
    training: launches that are issued ahead cost the device no time. The driver takes about a
    thousand launches ahead; a step of more waits for the device, and then the device for it.
    That data lies in no cache is up to the caller (benchmarks/lib/rotation.py).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_ms = 0.0
        self._cycles_per_ms = CYCLES_PER_MS
        self._event: Any = torch.cuda.Event  # torch gives it no types
        self._wait: Any = torch.cuda._sleep  # likewise

    def warm_up(self, prepare: Step, step: Step) -> None:
        # What the first steps compile is no reason to wait.
        self._host_ms, _ = self._alone(prepare, step)

    def __call__(self, turn: Callable[[], Turn]) -> Times:
        host_ms, alone_ms = self._alone(*turn())
        self._host_ms = max(self._host_ms, host_ms)
        device_ms, head_start_ms = self._issued_ahead(*turn())
        return Times(device_ms, host_ms, alone_ms, head_start_ms)

    def _alone(self, prepare: Step, step: Step) -> tuple[float, float]:
        """Until the call returns, and until the device is done."""
        prepare()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        step()
        host_ms = _ms_since(start)
        torch.cuda.synchronize(self._device)
        return host_ms, _ms_since(start)

    def _issued_ahead(self, prepare: Step, step: Step) -> tuple[float, float]:
        """What the device is busy for, and how long it was kept waiting before."""
        waiting, start, end = (self._event(enable_timing=True) for _ in range(3))
        wanted = min(max(MARGIN * self._host_ms, SHORTEST_MS), LONGEST_MS)
        cycles = round(wanted * self._cycles_per_ms)
        prepare()
        torch.cuda.synchronize(self._device)
        waiting.record()
        self._wait(cycles)
        start.record()
        step()
        end.record()
        end.synchronize()
        head_start_ms = waiting.elapsed_time(start)
        self._cycles_per_ms = cycles / head_start_ms
        return start.elapsed_time(end), head_start_ms


def _ms_since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)
