"""Steps are timed as they run in training; the calls, not the times."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.lib import timing


def test_a_gpu_is_busy_before_a_step_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("end")

        def elapsed_time(self, other: Any) -> float:
            return 0.0 if other is self else 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: calls.append("wait"))
    time_one = timing.timer(torch.device("cuda"))
    times = time_one(lambda: calls.append("prepare"), lambda: calls.append("step"))
    assert calls == ["idle", "prepare", "wait", "record", "step", "record", "end"]
    assert times.ms == 1.5
