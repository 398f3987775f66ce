"""Compiling that takes too long is given up."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class TooLong(BaseException):
    """Time is up. Not an Exception, as those are caught by compilers, which then do without."""


class Patience:
    """Seconds that each implementation may take to compile, and all of them together."""

    def __init__(self, each: float, in_all: float = math.inf) -> None:
        self.each = each
        self.left = in_all

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Raise `TooLong` in the main thread where that is over, or no time is left at all."""
        seconds = min(self.each, self.left)
        if seconds <= 0:
            raise TooLong
        start = time.monotonic()
        before = signal.signal(signal.SIGALRM, _raise)
        # Again every second: Python drops what is raised while it frees an object.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.left -= time.monotonic() - start


def _raise(*_: Any) -> None:
    raise TooLong


def stop_compilers() -> None:
    """Forget what is half compiled, and end the processes that would go on with it."""
    # What torch takes long to import is there where it has compiled anything.
    from torch._inductor.async_compile import shutdown_compile_workers

    torch.compiler.reset()
    shutdown_compile_workers()
