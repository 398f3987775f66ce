"""Measures providers beside each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from agc_triton import unitwise_norm
from benchmarks.lib.counters import count_launches, left_bytes, new_grads, peak_extra_bytes
from benchmarks.lib.machine import device_name, timestamp
from benchmarks.lib.optimizers import OPTIMIZERS, minimal_bytes, state_bytes_of_first_step
from benchmarks.lib.patience import TooLong, stop_compilers
from benchmarks.lib.providers import Provider
from benchmarks.lib.rotation import Rotation, cache_bytes, sets_needed
from benchmarks.lib.rows import summarize
from benchmarks.lib.timing import Times, timer
from benchmarks.lib.versions import triton_version
from benchmarks.lib.workloads import Workload, share_of_units_clipped

# Just under what glibc's threshold for blocks of their own grows to.
LARGEST_KEPT = 31 << 20


class Rounds(NamedTuple):
    """How often every provider makes a step: untimed first, then timed."""

    warmup: int
    timed: int


def measure(
    optimizer: str, providers: Sequence[Provider], workload: Workload, rounds: Rounds
) -> pd.DataFrame:
    """One row per provider, with ``COLUMNS``, of what `time_steps` finds."""
    return summarize(time_steps(optimizer, providers, workload, rounds))


def time_steps(
    optimizer: str, providers: Sequence[Provider], workload: Workload, rounds: Rounds
) -> pd.DataFrame:
    """One row per timed step, which repeats what there is to say of its provider.

    The providers take turns in every round, in a new order each time, so that whatever else the
    machine does hits all alike. Each has its own state; parameters and gradients lie in the same
    memory for all, and the gradients are written anew before every step, which also leaves the
    same CPU caches to each. On a GPU there are several sets of them (benchmarks/lib/rotation.py).
    A provider whose compiler takes too long is left out with a message.
    """
    device = workload.params[0].device
    size = sum(p.numel() * p.element_size() for p in workload.params)
    sets = sets_needed(set_bytes(optimizer, size), cache_bytes(device))
    settle_allocator()
    rotation = Rotation(providers, workload, sets)
    kept = _first_steps(rotation, providers, optimizer)
    rotation.keep(list(kept))
    providers = [providers[i] for i in kept]
    times = _time_in_turns(rotation, device, rounds, optimizer)
    common = _common_columns(optimizer, workload)
    rows: list[dict[str, Any]] = []
    found = zip(providers, times, kept.values(), strict=True)
    for i, (provider, of_step, left) in enumerate(found):
        params, step = rotation.params[i][0], rotation.steps[i][0]
        rotation.restore(0)
        peak = peak_extra_bytes(step, device)
        rotation.restore(0)
        of_provider = {
            **common,
            "implementation": provider.implementation,
            "version": provider.version,
            "role": provider.role,
            "sets": sets,
            "launches": count_launches(step, params, device),
            "peak_extra_bytes": peak,
            "peak_extra_share": peak / size,
            "kept_extra_bytes": None if provider.role == "copy" else left,
        }
        rows += [{**of_provider, **one._asdict()} for one in of_step]
    return pd.DataFrame(rows)


def settle_allocator() -> None:
    """Let what is allocated on a CPU and freed be handed out again, as after a while of training.

    glibc keeps blocks up to the largest one freed so far (32 MiB at most, mallopt(3)) and gives
    larger ones back to the system: without this, what ran before in the same process would decide
    how much the temporaries of the peers cost.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)


def set_bytes(optimizer: str, size: int) -> int:
    """Bytes of parameters of this size, their gradients and their states."""
    return size * (2 + OPTIMIZERS[optimizer].states)


def _time_in_turns(
    rotation: Rotation, device: torch.device, rounds: Rounds, title: str
) -> list[list[Times]]:
    """Times of every timed step of each provider, after untimed ones on every set."""
    order = random.Random(0)
    indices = range(len(rotation.steps))

    def one_round(at: int | None) -> list[tuple[int, int | None]]:
        return [(i, at) for i in order.sample(indices, len(indices))]

    warm_ups = rounds.warmup * rotation.count
    turns = [turn for n in range(warm_ups) for turn in one_round(n % rotation.count)]
    turns += [turn for _ in range(rounds.timed) for turn in one_round(None)]
    times: list[list[Times]] = [[] for _ in indices]
    timers = [timer(device) for _ in indices]
    for i, at in tqdm(turns, desc=title, unit="step", disable=None, leave=False):
        if at is None:
            times[i].append(timers[i](partial(rotation.turn, i)))
        else:
            timers[i].warm_up(*rotation.turn(i, at))
    return times


def _first_steps(
    rotation: Rotation, providers: Sequence[Provider], optimizer: str
) -> dict[int, int]:
    """What each provider's first step keeps, by its number; without those that take too long."""
    kept = {}
    for i, provider in enumerate(providers):
        if provider.patience is None:
            kept[i] = _kept_extra_bytes(rotation, i, optimizer)
            continue
        try:
            with provider.patience.limit():
                extra = _kept_extra_bytes(rotation, i, optimizer)
                _compile(rotation, i)
            kept[i] = extra
        except TooLong:
            stop_compilers()
            tqdm.write(f"{optimizer}, {provider.implementation}: left out, it compiles too long")
    return kept


def _compile(rotation: Rotation, provider: int) -> None:
    """Steps on each set: the second, of SGD, and one with other gradients may be compiled anew."""
    for at, step in enumerate(rotation.steps[provider]):
        for _ in range(2):
            step()
            rotation.restore(at)
        with new_grads(rotation.params[provider][at]):
            step()


def _kept_extra_bytes(rotation: Rotation, provider: int, optimizer: str) -> int:
    """What a provider's first step leaves allocated beside what torch's class makes as state."""
    params = rotation.params[provider][0]
    left = left_bytes(rotation.steps[provider][0], params[0].device)
    rotation.restore(0)
    return left - state_bytes_of_first_step(optimizer, params)


def _common_columns(optimizer: str, workload: Workload) -> dict[str, Any]:
    params, options = workload.params, OPTIMIZERS[optimizer].options
    return {
        "model": workload.model,
        "parameters": sum(p.numel() for p in params),
        "tensors": len(params),
        "units": sum(unitwise_norm(p).numel() for p in params),
        "optimizer": optimizer,
        "options": ", ".join(f"{name}={value}" for name, value in options.items()),
        "device": device_name(params[0].device),
        "threads": torch.get_num_threads(),
        "dtype": str(params[0].dtype).removeprefix("torch."),
        "bytes_moved": minimal_bytes(optimizer, params),
        "share_of_units_clipped": share_of_units_clipped(params, workload.grads),
        "torch": torch.__version__,
        "triton": triton_version(),
        "timestamp": timestamp(),
    }
