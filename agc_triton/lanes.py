"""Two threads that take work from one queue: while one computes in cache, the other reads memory.

torch runs one operation after another with all its threads, which all wait for memory together and
all leave it idle together. Two lanes with half of the threads each fill one another's gaps.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from threading import Barrier, Event
from typing import TypeVar

import torch

LANES = 2

# Fewer elements are done before two threads have been woken.
SHARED = 1 << 19

Item = TypeVar("Item")


def lanes(elements: int) -> int:
    """How many lanes that many elements are worth; one is the caller's own thread."""
    if elements < SHARED or torch.get_num_threads() < LANES or _thread_matters():
        return 1
    return LANES


def _thread_matters() -> bool:
    """Whether another thread would see tensors, or be seen, differently from the caller's."""
    return (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        # Threads of other kinds are one pool for the process, which cannot be shared out.
        or not torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]  # torch's own
    )


def share(work: Callable[[int, Item], None], items: Sequence[Item], lanes: int) -> None:
    """Call ``work(lane, item)`` once for each item; when it returns or raises, no lane is at work.

    After an error or an interrupt no further item is begun.
    """
    if lanes == 1:
        for item in items:
            work(0, item)
        return
    queue: SimpleQueue[Item | None] = SimpleQueue()
    for entry in (*items, *[None] * lanes):
        queue.put(entry)
    stopped = Event()

    def take(lane: int) -> None:
        try:
            with torch.no_grad():
                for item in iter(queue.get, None):
                    if stopped.is_set():
                        return
                    work(lane, item)
        except BaseException:
            stopped.set()
            raise

    running = [_threads(torch.get_num_threads()).submit(take, lane) for lane in range(lanes)]
    try:
        wait(running)
    except BaseException:
        stopped.set()
        wait(running)
        raise
    for lane in running:
        lane.result()


@functools.cache
def _threads(total: int) -> ThreadPoolExecutor:
    """The process's lanes where torch has that many threads for an operation."""
    pool = ThreadPoolExecutor(LANES, "agc_triton", torch.set_num_threads, (total // LANES,))
    started = Barrier(LANES + 1)
    for _ in range(LANES):
        pool.submit(started.wait)
    started.wait()
    # torch gives threads that are born later the number that any thread has set last.
    torch.set_num_threads(total)
    return pool


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
