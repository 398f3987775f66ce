"""Runs here or in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from benchmarks.lib.compare.grid import Run
from benchmarks.lib.compare.training import Row, Where, train

# A process that is forked cannot use CUDA where its parent did.
START = "spawn"


class Task(NamedTuple):
    """A run of which so many rows have been written."""

    run: Run
    written: int


class Event(NamedTuple):
    """A row of a run, or without one its end, with what stopped it if anything did."""

    run: Run
    row: Row | None = None
    failure: str = ""


def perform(task: Task, where: Where) -> Iterator[Event]:
    """One run; an error ends it and nothing else."""
    try:
        for row in train(task.run, task.written, where):
            yield Event(task.run, row)
    except Exception as error:
        yield Event(task.run, failure=f"{type(error).__name__}: {error}")
    else:
        yield Event(task.run)


def perform_all(tasks: Sequence[Task], jobs: int, where: Where) -> Generator[Event]:
    """All runs, here if one at a time, else in so many processes."""
    if jobs > 1:
        yield from _in_processes(tasks, min(jobs, len(tasks)), where)
        return
    torch.set_num_threads(where.threads)
    for task in tasks:
        yield from perform(task, where)


class Worker:
    """A process, and the task it is at."""

    def __init__(self, where: Where) -> None:
        context: Any = multiprocessing.get_context(START)
        self.ours, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, where))
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        """What to do next."""
        self.task = task
        with suppress(BrokenPipeError):  # it has ended, which `receive` will say
            self.ours.send(task)

    def receive(self) -> Event:
        """The next event; the end of the process is one."""
        assert self.task is not None
        try:
            event: Event = self.ours.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            failure = f"its process ended with {self.process.exitcode}; out of memory? fewer --jobs"
            return Event(self.task.run, failure=failure)
        else:
            return event

    def end(self) -> None:
        """At once."""
        self.process.terminate()
        self.process.join()
        self.ours.close()


def _in_processes(tasks: Sequence[Task], jobs: int, where: Where) -> Iterator[Event]:
    waiting = iter(tasks)
    workers = {worker.ours: worker for worker in (Worker(where) for _ in range(jobs))}
    try:
        for worker, task in zip(workers.values(), waiting, strict=False):
            worker.give(task)
        while busy := [worker.ours for worker in workers.values() if worker.task]:
            for ready in connection.wait(busy):
                assert isinstance(ready, Connection)
                worker = workers[ready]
                event = worker.receive()
                yield event
                if event.row is None:
                    worker.task = None
                    _go_on(workers, worker, next(waiting, None), where)
    finally:
        for worker in workers.values():
            worker.end()


def _go_on(
    workers: dict[Connection, Worker], worker: Worker, task: Task | None, where: Where
) -> None:
    """With what is next, if anything is; a process that has ended is replaced."""
    if task is None:
        return
    if not worker.process.is_alive():
        del workers[worker.ours]
        worker.end()
        worker = Worker(where)
        workers[worker.ours] = worker
    worker.give(task)


def _serve(conn: Connection, where: Where) -> None:
    """Of a process: tasks until it is ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(where.threads)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            for event in perform(conn.recv(), where):
                conn.send(event)


def _end_with_parent() -> None:
    """However the parent ends, nobody is left to take the rows."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
