"""Counts what one step starts on a GPU, and the memory it takes beside what is there already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile
from torch.profiler import DeviceType, ProfilerActivity

from benchmarks.lib.timing import Step

CPU = torch.device("cpu")


def count_launches(step: Step, params: Sequence[Tensor], device: torch.device) -> int | None:
    """Kernels, copies and fills that a step starts on a GPU, whoever starts them; None on a CPU.

    Every gradient lies at another address than before, as in training with set_to_none=True.
    """
    if device.type != "cuda":
        return None
    with new_grads(params):
        step()  # what a step with other gradients compiles is not counted
        with new_grads(params):
            return launched(profiled_events(step, device))


@contextmanager
def new_grads(params: Sequence[Tensor]) -> Iterator[None]:
    """Copies in place of the gradients."""
    grads = [p.grad for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.clone()
    yield
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def profiled_events(step: Step, device: torch.device) -> Iterable[Any]:
    """What torch's profiler says of a step on a GPU."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(device)
    return profiled.events() or ()


def launched(events: Iterable[Any]) -> int:
    """How many of a profile's events are work of a GPU; torch's annotations of steps are not."""
    on_device = (e for e in events if e.device_type == DeviceType.CUDA)
    return sum(not e.is_user_annotation for e in on_device)


def peak_extra_bytes(step: Step, device: torch.device = CPU) -> int:
    """Most bytes held at once of what torch allocated during a call; on a CPU, in this thread.

    What was there before (parameters, gradients, optimizer state) does not count; on a CPU not
    even where it is freed.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    return max(_bytes_held(step))


def left_bytes(step: Step, device: torch.device = CPU) -> int:
    """Bytes of what torch allocated during a call and has not freed; on a CPU, in this thread.

    On a GPU they are counted as torch's allocator rounds them up.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.memory_allocated(device) - before
    return _bytes_held(step)[-1]


def _bytes_held(step: Step) -> list[int]:
    """After each allocation and each freeing on a CPU, of what a call has allocated."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # it reports its start and stop on stderr
    # torch.profiler would do as well, but spends seconds on importing torch._inductor.
    with profile(profile_memory=True) as profiled:
        step()
    events = _with_children(profiled.kineto_results.experimental_event_tree())
    blocks = [e for e in events if e.tag == _EventType.Allocation]
    live: dict[int, int] = {}
    held = [0]
    for block in sorted(blocks, key=lambda e: e.start_time_ns):
        address, size = block.extra_fields.ptr, block.extra_fields.alloc_size
        if size > 0:
            live[address] = size
        # Torch may know the size of a block from an earlier profile of another at its address.
        held.append(held[-1] + (size if size > 0 else -live.pop(address, 0)))
    return held


def _with_children(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _with_children(event.children)
