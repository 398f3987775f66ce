"""What does not fit in memory is seen before it is allocated."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.lib import memory_limits
from benchmarks.lib.copying import copy_provider
from benchmarks.lib.counters import peak_extra_bytes
from benchmarks.lib.memory_limits import bytes_needed, free_bytes, why_not
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.providers import providers
from benchmarks.lib.rotation import Rotation
from benchmarks.lib.workloads import workload_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 10 GiB left, in no group."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {20 << 20} kB\nMemFree: 1 kB\nMemAvailable: {10 << 20} kB\n")
    monkeypatch.setattr(memory_limits, "MEMINFO", meminfo)
    names = ("limit", "used", "stat")
    groups = [tuple(tmp_path / f"{name}{v}" for name in names) for v in (2, 1)]
    monkeypatch.setattr(memory_limits, "CGROUPS", groups)
    return tmp_path


def in_group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    (folder / f"limit{version}").write_text(f"{limit}\n")
    (folder / f"used{version}").write_text(f"{used}\n")
    (folder / f"stat{version}").write_text(f"active_file 5\ninactive_file {cached}\nx 1\n")


def test_what_the_machine_has_left() -> None:
    assert free_bytes(CPU) == 10 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_less(version: int, machine: Path) -> None:
    in_group(machine, version, str(4 * GIB), 3 * GIB, GIB // 2)
    assert free_bytes(CPU) == 1.5 * GIB


def test_a_container_without_a_limit(machine: Path) -> None:
    in_group(machine, 2, "max", 3 * GIB, 0)
    assert free_bytes(CPU) == 10 * GIB


def test_without_linux_everything_fits(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert free_bytes(CPU) == math.inf
    assert why_not(1 << 60, CPU) is None


def test_a_gpu_has_what_is_free_and_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4 * GIB)
    assert free_bytes(CUDA) == 4 * GIB


def test_a_reason_is_given_where_memory_is_short() -> None:
    assert why_not(9 * GIB, CPU) is None
    assert why_not(9.5 * GIB, CPU) == "it needs 9.5 GiB, over 90% of the 10.0 GiB free"


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [*((name, torch.float32) for name in OPTIMIZERS), ("adamw", torch.bfloat16)],
    ids=str,
)
def test_as_much_as_a_measurement_holds_and_not_much_more(
    optimizer: str, dtype: torch.dtype
) -> None:
    compared = [*providers(optimizer, "cpu", dtype), copy_provider(optimizer)]
    workload = workload_of("tiny", [(300, 200)] * 20, dtype)

    def step_all() -> None:
        rotation = Rotation(compared, workload, 1)
        for (step,) in rotation.steps:
            step()

    held = peak_extra_bytes(step_all)
    needed = bytes_needed(optimizer, compared, [60_000] * 20, dtype.itemsize)
    assert held <= needed <= 1.2 * held
