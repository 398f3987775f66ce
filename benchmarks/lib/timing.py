"""How long one step takes, on a CPU or a CUDA device, behind one function."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Step = Callable[[], object]


class Times(NamedTuple):
    """Milliseconds of one step: until it is done, and until ``step()`` returns."""

    ms: float
    host_ms: float


def timer(device: torch.device) -> Callable[[Step, Step], Times]:
    """The function ``(prepare, step) -> Times`` for a device; ``prepare`` is not timed."""
    return _CudaTimer(device) if device.type == "cuda" else _cpu_times


def _cpu_times(prepare: Step, step: Step) -> Times:
    prepare()
    start = time.perf_counter()
    step()
    ms = 1e3 * (time.perf_counter() - start)
    return Times(ms, ms)


# About a millisecond of waiting on the device.
HEAD_START_CYCLES = 2_000_000


class _CudaTimer:
    """Times by events on the current stream.

    ``prepare`` and a kernel that only waits are still running when ``step()`` starts, as backward
    passes are in training: launches that are issued ahead of the device cost no time, and a step
    that cannot be issued in time shows it. That its data lies in no cache is up to the caller
    (benchmarks/rotation.py).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = torch.cuda.Event  # torch gives it no types
        self._wait: Any = torch.cuda._sleep  # likewise

    def __call__(self, prepare: Step, step: Step) -> Times:
        start, end = self._event(enable_timing=True), self._event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        prepare()
        self._wait(HEAD_START_CYCLES)
        start.record()
        called = time.perf_counter()
        step()
        host_ms = 1e3 * (time.perf_counter() - called)
        end.record()
        end.synchronize()
        return Times(start.elapsed_time(end), host_ms)
