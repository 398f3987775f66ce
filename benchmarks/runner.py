"""Measures providers beside each other and turns what it finds into rows."""

from __future__ import annotations

import os
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn import Parameter
from tqdm import tqdm

from benchmarks.providers import Provider, Step
from benchmarks.shapes import Workload, share_of_units_clipped

COLUMNS = [
    *("model", "parameters", "tensors", "optimizer", "implementation", "version"),
    *("device", "threads", "dtype", "rounds", "median_ms", "p20_ms", "p80_ms"),
    *("ratio_to_unclipped", "ratio_to_best_peer", "peak_extra_bytes", "peak_extra_share"),
    *("share_of_units_clipped", "torch", "timestamp"),
]


class Rounds(NamedTuple):
    """How often every provider makes a step: untimed first, then timed."""

    warmup: int
    timed: int


def measure(
    optimizer: str, providers: Sequence[Provider], workload: Workload, rounds: Rounds
) -> pd.DataFrame:
    """One row per provider: ``COLUMNS`` and the provider's role.

    The providers take turns in every round, in a new order each time, so that whatever else the
    machine does hits all alike. Each has its own parameters and state; the gradients are shared and
    written anew before every step, which also leaves the same caches to each.
    """
    grads = [g.clone() for g in workload.grads]
    params: list[list[Tensor]] = [
        [Parameter(p.clone()) for p in workload.params] for _ in providers
    ]
    for p, g in ((p, g) for own in params for p, g in zip(own, grads, strict=True)):
        p.grad = g
    steps = [provider.build(own) for provider, own in zip(providers, params, strict=True)]

    def restore_grads() -> None:
        torch._foreach_copy_(grads, workload.grads)

    times = _time_in_turns(steps, restore_grads, rounds, optimizer)
    common = _common_columns(optimizer, workload, rounds.timed)
    size = sum(p.numel() * p.element_size() for p in workload.params)
    rows: list[dict[str, Any]] = []
    for provider, own, step, ms in zip(providers, params, steps, times, strict=True):
        restore_grads()
        peak = peak_extra_bytes(step)
        rows.append(
            {
                **common,
                "implementation": provider.implementation,
                "version": provider.version,
                "role": provider.role,
                "peak_extra_bytes": peak,
                "peak_extra_share": peak / size,
                "share_of_units_clipped": share_of_units_clipped(own, workload.grads),
                **_quantiles(ms),
            }
        )
    return _with_ratios(pd.DataFrame(rows))


def _time_in_turns(
    steps: Sequence[Step], before_each: Callable[[], None], rounds: Rounds, title: str
) -> list[list[float]]:
    """Milliseconds of every timed call of each step."""
    order = random.Random(0)
    indices = range(len(steps))
    turns = [i for _ in range(sum(rounds)) for i in order.sample(indices, len(indices))]
    times: list[list[float]] = [[] for _ in steps]
    for i in tqdm(turns, desc=title, unit="step", disable=None):
        before_each()
        start = time.perf_counter()
        steps[i]()
        times[i].append(1e3 * (time.perf_counter() - start))
    return [ms[rounds.warmup :] for ms in times]


def peak_extra_bytes(step: Step) -> int:
    """Most bytes held at once of what torch allocated during a call, in the calling thread.

    What was there before (parameters, gradients, optimizer state) does not count, freed or not.
    """
    os.environ["KINETO_LOG_LEVEL"] = "99"  # it reports its start and stop on stderr
    # torch.profiler would do as well, but spends seconds on importing torch._inductor.
    with profile(profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    peak: int = max(accumulate(changes, initial=0))
    return peak


def _common_columns(optimizer: str, workload: Workload, rounds: int) -> dict[str, Any]:
    return {
        "model": workload.model,
        "parameters": sum(p.numel() for p in workload.params),
        "tensors": len(workload.params),
        "optimizer": optimizer,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(workload.params[0].dtype).removeprefix("torch."),
        "rounds": rounds,
        "torch": torch.__version__,
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """What Linux calls the processor; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _quantiles(ms: Sequence[float]) -> dict[str, float]:
    p20, median, p80 = pd.Series(ms).quantile([0.2, 0.5, 0.8])
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80}


def _with_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Times the unclipped step, and times as fast as the best peer; the fastest of each counts."""
    best = rows.groupby("role")["median_ms"].min()
    rows["ratio_to_unclipped"] = rows["median_ms"] / best.get("unclipped", float("nan"))
    rows["ratio_to_best_peer"] = best.get("peer", float("nan")) / rows["median_ms"]
    return rows
