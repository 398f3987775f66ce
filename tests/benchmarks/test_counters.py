"""Launches and the memory that steps take are counted."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn import Parameter
from torch.profiler import DeviceType

from agc_triton import AdamW_AGC
from benchmarks.lib import counters
from benchmarks.lib.counters import count_launches, launched, left_bytes, peak_extra_bytes
from benchmarks.lib.timing import Step

CPU = torch.device("cpu")


def test_nothing_is_launched_on_a_cpu() -> None:
    params = [Parameter(torch.ones(2, 3))]
    params[0].grad = torch.ones(2, 3)
    if os.environ.get("TRITON_INTERPRET") == "1":  # without a GPU
        assert count_launches(AdamW_AGC(params, backend="triton").step, params, CPU) is None
    assert count_launches(AdamW_AGC(params, backend="torch").step, params, CPU) is None


def test_launches_are_counted_with_gradients_at_other_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(4)), Parameter(torch.ones(()))]
    for p in params[:2]:
        p.grad = torch.full_like(p, 0.5)
    grads = [p.grad for p in params]
    found: list[list[Tensor | None]] = []

    def step() -> None:
        found.append([p.grad for p in params])

    def profiled(step: Step, device: torch.device) -> list[Any]:
        assert device.type == "cuda"
        step()
        return [event(DeviceType.CUDA), event(DeviceType.CPU), event(DeviceType.CUDA)]

    monkeypatch.setattr(counters, "profiled_events", profiled)
    assert count_launches(step, params, torch.device("cuda")) == 2
    assert [id(p.grad) for p in params] == list(map(id, grads))
    assert len(found) == 2
    for i in range(2):
        tensors = [of_step[i] for of_step in (grads, *found)]
        assert len({t.data_ptr() for t in tensors if t is not None}) == 3
        assert all(t is not None and torch.equal(t, tensors[0]) for t in tensors)  # type: ignore[arg-type]
    assert [of_step[2] for of_step in found] == [None, None]


def event(device: DeviceType, is_user_annotation: bool = False) -> Any:
    return SimpleNamespace(device_type=device, is_user_annotation=is_user_annotation)


def test_a_launch_is_work_of_the_device() -> None:
    annotated = event(DeviceType.CUDA, is_user_annotation=True)
    events = [event(DeviceType.CUDA), event(DeviceType.CPU), annotated, event(DeviceType.CUDA)]
    assert launched(events) == 2


def test_events_of_torchs_profiler_say_where_they_ran() -> None:
    with torch.autograd.profiler.profile() as profiled, record_function("step"):
        torch.ones(2).add_(1)
    events = profiled.function_events or []
    assert any(e.is_user_annotation for e in events)
    assert launched(events) == 0


def test_peak_extra_bytes_of_known_allocations() -> None:
    kept = torch.zeros(1 << 20)

    def step() -> None:
        first = torch.ones(3 << 18)  # 3 MiB
        second = torch.ones(1 << 18, dtype=torch.float64)  # and 2 MiB beside it
        del first
        third = torch.ones(1 << 20)  # and 4 MiB after 3 were freed: 6 MiB, the most
        del second
        kept.add_(third)
        torch.ones(1 << 18)  # 5 MiB

    for _ in range(2):
        assert peak_extra_bytes(step) == 6 << 20
    assert peak_extra_bytes(lambda: kept.add_(kept)) == 0


def test_left_bytes_of_known_allocations() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        kept.append(torch.ones(1 << 18) + torch.ones(1 << 18))

    for _ in range(2):
        assert left_bytes(step) == 1 << 20
    assert left_bytes(lambda: torch.ones(1 << 18)) == 0


def test_peak_extra_bytes_leaves_out_what_was_there_before() -> None:
    held = [torch.ones(1 << 20)]

    def step() -> None:
        held.clear()
        torch.ones(1 << 18)

    assert peak_extra_bytes(step) == 1 << 20


def test_blocks_at_addresses_of_those_that_a_call_left_were_there_before() -> None:
    held: list[Tensor] = []

    def allocate() -> None:
        held.extend(torch.ones(1 << 18) for _ in range(20))

    assert left_bytes(allocate) == 20 << 20
    before = {x.data_ptr() for x in held}
    held.clear()
    allocate()
    assert before & {x.data_ptr() for x in held}

    def step() -> None:
        held.clear()
        torch.ones(1 << 18)

    assert peak_extra_bytes(step) == 1 << 20


def test_peak_extra_bytes_sees_what_operations_allocate_inside() -> None:
    x = torch.rand(1 << 20)
    assert peak_extra_bytes(lambda: x.copy_(x * 2 + x)) == 8 << 20
