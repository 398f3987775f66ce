"""Measures providers beside each other and turns what it finds into rows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn import Parameter
from torch.profiler import DeviceType, ProfilerActivity
from tqdm import tqdm

from agc_triton import unitwise_norm
from agc_triton.optim.optimizer import AGCOptimizer
from benchmarks.providers import Provider, minimal_bytes
from benchmarks.shapes import Workload, share_of_units_clipped
from benchmarks.timing import Step, Times, timer

CPU = torch.device("cpu")

COLUMNS = [
    *("model", "parameters", "tensors", "units", "optimizer", "implementation", "version", "role"),
    *("device", "threads", "dtype", "rounds", "median_ms", "p20_ms", "p80_ms", "host_ms"),
    *("bytes_moved", "gb_per_s", "share_of_copy_bandwidth"),
    *("ratio_to_unclipped", "ratio_to_best_peer", "launches"),
    *("peak_extra_bytes", "peak_extra_share", "share_of_units_clipped"),
    *("torch", "triton", "timestamp"),
]


class Rounds(NamedTuple):
    """How often every provider makes a step: untimed first, then timed."""

    warmup: int
    timed: int


def measure(
    optimizer: str, providers: Sequence[Provider], workload: Workload, rounds: Rounds
) -> pd.DataFrame:
    """One row per provider, with ``COLUMNS``.

    The providers take turns in every round, in a new order each time, so that whatever else the
    machine does hits all alike. Each has its own state; parameters and gradients lie in the same
    memory for all, and the gradients are written anew before every step, which also leaves the
    same caches to each.
    """
    grads = [g.clone() for g in workload.grads]
    device = grads[0].device
    shared = [p.clone() for p in workload.params]
    params: list[list[Tensor]] = [[Parameter(p) for p in shared] for _ in providers]
    for p, g in ((p, g) for own in params for p, g in zip(own, grads, strict=True)):
        p.grad = g
    steps = [provider.build(own) for provider, own in zip(providers, params, strict=True)]

    def restore_grads() -> None:
        torch._foreach_copy_(grads, workload.grads)

    times = _time_in_turns(steps, restore_grads, device, rounds, optimizer)
    common = _common_columns(optimizer, workload, rounds.timed)
    size = sum(p.numel() * p.element_size() for p in shared)
    rows: list[dict[str, Any]] = []
    for provider, step, of_step in zip(providers, steps, times, strict=True):
        restore_grads()
        peak = peak_extra_bytes(step, device)
        restore_grads()
        rows.append(
            {
                **common,
                "implementation": provider.implementation,
                "version": provider.version,
                "role": provider.role,
                "launches": count_launches(step, device),
                "peak_extra_bytes": peak,
                "peak_extra_share": peak / size,
                **_quantiles([t.ms for t in of_step]),
                "host_ms": median(t.host_ms for t in of_step),
            }
        )
    return _with_ratios(pd.DataFrame(rows))


def _time_in_turns(
    steps: Sequence[Step],
    before_each: Step,
    device: torch.device,
    rounds: Rounds,
    title: str,
) -> list[list[Times]]:
    """Times of every timed call of each step."""
    order = random.Random(0)
    indices = range(len(steps))
    turns = [i for _ in range(sum(rounds)) for i in order.sample(indices, len(indices))]
    times: list[list[Times]] = [[] for _ in steps]
    time_one = timer(device)
    for i in tqdm(turns, desc=title, unit="step", disable=None, leave=False):
        times[i].append(time_one(before_each, steps[i]))
    return [of_step[rounds.warmup :] for of_step in times]


def count_launches(step: Step, device: torch.device) -> int | None:
    """Kernels that a step launches: ours as planned, others as profiled, None on a CPU."""
    optimizer = getattr(step, "__self__", None)
    if isinstance(optimizer, AGCOptimizer):
        planned = int(optimizer.explain()["launches"].iloc[-1])
        if planned:
            return planned
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(device)
    launched: int = sum(e.device_type == DeviceType.CUDA for e in profiled.events() or ())
    return launched


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
    os.environ["KINETO_LOG_LEVEL"] = "99"  # it reports its start and stop on stderr
    # torch.profiler would do as well, but spends seconds on importing torch._inductor.
    with profile(profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    peak: int = max(accumulate(changes, initial=0))
    return peak


def _common_columns(optimizer: str, workload: Workload, rounds: int) -> dict[str, Any]:
    params = workload.params
    return {
        "model": workload.model,
        "parameters": sum(p.numel() for p in params),
        "tensors": len(params),
        "units": sum(unitwise_norm(p).numel() for p in params),
        "optimizer": optimizer,
        "device": device_name(params[0].device),
        "threads": torch.get_num_threads(),
        "dtype": str(params[0].dtype).removeprefix("torch."),
        "rounds": rounds,
        "bytes_moved": minimal_bytes(optimizer, params),
        "share_of_units_clipped": share_of_units_clipped(params, workload.grads),
        "torch": torch.__version__,
        "triton": triton_version(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu_name`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def triton_version() -> str:
    """The installed Triton's version, without importing it; empty where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """What Linux calls the processor; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _quantiles(ms: Sequence[float]) -> dict[str, float]:
    p20, median_ms, p80 = pd.Series(ms).quantile([0.2, 0.5, 0.8])
    return {"median_ms": median_ms, "p20_ms": p20, "p80_ms": p80}


def _with_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Bandwidth, and step times beside those of other roles; the fastest of each role counts."""
    best, nan = rows.groupby("role")["median_ms"].min(), float("nan")
    rows["gb_per_s"] = rows["bytes_moved"] / rows["median_ms"] / 1e6
    rows["share_of_copy_bandwidth"] = best.get("copy", nan) / rows["median_ms"]
    rows["ratio_to_unclipped"] = rows["median_ms"] / best.get("unclipped", nan)
    rows["ratio_to_best_peer"] = best.get("peer", nan) / rows["median_ms"]
    rows["launches"] = rows["launches"].astype("Int64")
    return rows[COLUMNS]
