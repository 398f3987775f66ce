"""Whether a measurement fits: what it will hold, and what memory is free before it starts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lib.copying import copied_at_once
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.providers import Provider

# The rest is for what is not counted here.
USABLE = 0.9
MEMINFO = Path("/proc/meminfo")
# Limit, use and what of the use can be taken back, of a container: cgroup 2 and 1.
CGROUP = Path("/sys/fs/cgroup")
CGROUPS = [
    (CGROUP / "memory.max", CGROUP / "memory.current", CGROUP / "memory.stat"),
    (
        CGROUP / "memory" / "memory.limit_in_bytes",
        CGROUP / "memory" / "memory.usage_in_bytes",
        CGROUP / "memory" / "memory.stat",
    ),
]


def why_not(needed: float, device: torch.device) -> str | None:
    """Says what is missing where a device has not so many bytes left, with some to spare."""
    free = free_bytes(device)
    if needed <= USABLE * free:
        return None
    gib = 1 << 30
    return f"it needs {needed / gib:.1f} GiB, over {USABLE:.0%} of the {free / gib:.1f} GiB free"


def bytes_needed(
    optimizer: str, providers: Sequence[Provider], sizes: Sequence[int], itemsize: int
) -> int:
    """What `measure.measure` holds at most beside its workload, for tensors of these sizes."""
    whole, largest = sum(sizes) * itemsize, max(sizes) * itemsize
    shared = 2 * whole  # parameters and gradients
    states = OPTIMIZERS[optimizer].states
    copied = copied_at_once((3 + 2 * states) * whole)
    own = sum(copied if p.role == "copy" else states * whole for p in providers)
    # torch's foreach keeps up to two tensors per parameter (Adagrad's and Adadelta's), which is as
    # much as the new gradients while launches are counted on a GPU; clipping one takes up to three.
    return shared + own + 2 * whole + 3 * largest


def free_bytes(device: torch.device) -> float:
    """Bytes that can be allocated; infinity where nothing says so."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    free_by_group = [_left_in_group(*paths) for paths in CGROUPS]
    return min(_free_on_machine(), *free_by_group)


def _free_on_machine() -> float:
    found = re.search(r"MemAvailable:\s*(\d+) kB", _text(MEMINFO))
    return int(found[1]) * 1024 if found else math.inf


def _left_in_group(limit: Path, used: Path, stat: Path) -> float:
    if not _text(limit).isdigit():  # "max", or no such group
        return math.inf
    cached = re.search(r"^inactive_file (\d+)$", _text(stat), re.MULTILINE)
    return int(_text(limit)) - int(_text(used)) + (int(cached[1]) if cached else 0)


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
