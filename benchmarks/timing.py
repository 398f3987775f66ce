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


# More than any L2 cache holds, and some tenths of a millisecond to write.
FLUSH_BYTES = 1 << 30


class _CudaTimer:
    """Times by events on the current stream, with nothing of the step's data in the L2 cache.

    ``prepare`` and then a write of `FLUSH_BYTES` are still running when ``step()`` starts, as
    backward passes are in training: launches that are issued ahead of the device cost no time, and
    a step that cannot be issued in time shows it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = torch.cuda.Event  # torch gives it no types
        self._other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, prepare: Step, step: Step) -> Times:
        start, end = self._event(enable_timing=True), self._event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        prepare()
        self._other.zero_()
        start.record()
        called = time.perf_counter()
        step()
        host_ms = 1e3 * (time.perf_counter() - called)
        end.record()
        end.synchronize()
        return Times(start.elapsed_time(end), host_ms)
