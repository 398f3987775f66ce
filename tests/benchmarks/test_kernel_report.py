"""Kernel reports say what the compiler says; the kernels that spilled are compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agc_triton.triton_path import launches
from benchmarks import kernel_report
from benchmarks.kernel_report import BANDWIDTH, DTYPES, OPTIMIZERS, Kernel, kernel_of, plan_model
from benchmarks.lib.compiled import MachineCode, read_machine_code, resident_warps
from benchmarks.lib.workloads import TABLES

ROOT = Path(__file__).parents[2]
MODELS = sorted(path.stem for path in TABLES.glob("*.csv"))

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function step:
  REG:64 STACK:16 SHARED:128 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        /*0010*/                   LDG.E.64 R2, [R2.64] ;
        /*0020*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0030*/              @!P0 LDG.E.128.CONSTANT R8, [R2.64] ;
        /*0040*/                   LDG.E R12, [R2.64] ;
        /*0050*/                   LDG.E.U8 R13, [R2.64] ;
        /*0060*/                   LDG.E.U16 R14, [R2.64] ;
        /*0070*/                   LDS.128 R16, [R2] ;
        /*0080*/              @!P0 STG.E.128 [R2.64], R4 ;
        /*0090*/                   STG.E.U16 [R2.64], R14 ;
        /*00a0*/                   STL.64 [R1], R4 ;
"""


def test_machine_code_is_counted_by_width() -> None:
    assert read_machine_code(USAGE, SASS) == MachineCode(
        64, 16, Counter({128: 2, 64: 1, 32: 1, 16: 1, 8: 1}), Counter({128: 1, 16: 1})
    )


@pytest.mark.parametrize(
    ("registers", "num_warps", "expected"),
    [
        (64, 8, 32),  # registers for 1024 threads
        (65, 8, 24),  # allotted in eights: 72
        (32, 4, 64),  # the most warps
        (16, 1, 32),  # the most programs
        (64, 32, 32),
        (65, 32, 0),
    ],
)
def test_resident_warps(registers: int, num_warps: int, expected: int) -> None:
    assert resident_warps(registers, num_warps) == expected


def test_optimizers_ask_for_their_own_kernels() -> None:
    assert {name: kernel_of(name) for name in OPTIMIZERS} == {
        "SGD": Kernel("sgd", 1, 1),
        "Adam": Kernel("adam", 0, 2),
        "AdamW": Kernel("adam", 0, 2),
        "AdamW-amsgrad": Kernel("adam", 1, 3),
        "RMSprop": Kernel("rmsprop", 0, 1),
        "RMSprop-momentum": Kernel("rmsprop", 2, 2),
        "RMSprop-centered-momentum": Kernel("rmsprop", 3, 3),
    }


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every kernel has 40 registers and reads and writes p, g and states once in full width."""
    asked: list[tuple[Any, ...]] = []

    def code(shape: Any, rule: str, flags: int, states: int, dtype: Any, arch: str) -> MachineCode:
        asked.append((shape, rule, flags, states, dtype, arch))
        width = 8 * dtype.itemsize * shape.vector
        times = shape.rows * shape.columns * shape.chunks // (32 * shape.num_warps * shape.vector)
        loads = Counter({width: (2 + states) * times, 7: 1})
        return MachineCode(40, 8, loads, Counter({width: (1 + states) * times}))

    monkeypatch.setattr(kernel_report, "step_code", code)
    monkeypatch.setattr(kernel_report, "compile_begin", lambda *_: None)
    return asked


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_row_per_bucket_of_every_model(
    optimizer: str, dtype: str, nothing_compiled: list[tuple[Any, ...]]
) -> None:
    table = kernel_report.report(MODELS, [optimizer], [dtype], ["80", "90"])
    kernel, itemsize = kernel_of(optimizer), DTYPES[dtype].itemsize
    for (model, _), rows in table.groupby(["model", "arch"]):
        plan = plan_model(model, DTYPES[dtype], kernel.states)
        assert rows["elements"].tolist() == [bucket.elements for bucket in plan.buckets]
        assert rows["share"].sum() == pytest.approx(1)
        assert set(rows["launches"]) == {2 + len(plan.buckets)}
        moved = (rows["bytes_per_parameter"] * rows["elements"]).sum()
        least = itemsize * (3 + 2 * kernel.states) * rows["elements"].sum()
        assert least <= moved <= 1.1 * least
        for gpu, terabytes in BANDWIDTH.items():
            predicted = pytest.approx(moved / terabytes / 1e9)
            assert rows[f"predicted_ms_{gpu}"].tolist() == [predicted] * len(rows)
    assert set(table["model"]) == set(MODELS)
    assert (table["loads_per_element"] == 2 + kernel.states).all()
    assert (table["stores_per_element"] == 1 + kernel.states).all()
    assert table["load_bits"].str.endswith(" 1x7").all()
    assert set(table["occupancy"]) <= {n / 64 for n in range(32, 65)}
    assert {asked[1:4] for asked in nothing_compiled} == {tuple(kernel)}

    summary = kernel_report.summary(table)
    assert len(summary) == 2 * len(MODELS)
    assert set(summary["worst_spill_bytes"]) == {8}


def test_kernels_are_not_reported_where_they_are_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launches, "interpreted", lambda: True)
    with pytest.raises(SystemExit):
        kernel_report.main(["--out", str(tmp_path / "rows.csv")])
    assert "unset it" in capsys.readouterr().err


# Units whose kernels spilled once: 16 warps of three chunks beside three states, 16-bit tiles.
COMPILE = """
import sys, torch
from agc_triton.triton_path.buckets import TensorUnits, ideal_shape
from agc_triton.units import UnitLayout
from benchmarks.lib.compiled import resident_warps, step_code
from benchmarks.kernel_report import kernel_of
for optimizer, length, dtype, arch in (
    ("AdamW-amsgrad", 6144, torch.float32, "90"),
    ("RMSprop-centered-momentum", 6144, torch.float32, "90"),
    ("AdamW-amsgrad", 1 << 20, torch.bfloat16, "80"),
    ("AdamW", 1 << 20, torch.bfloat16, "80"),
):
    kernel = kernel_of(optimizer)
    units = TensorUnits(UnitLayout(1, 2, length), True, 0)
    shape = ideal_shape(units, dtype.itemsize, kernel.states)
    code = step_code(shape, *kernel, dtype, arch)
    warps = resident_warps(code.registers, shape.num_warps)
    print(optimizer, code.spill_bytes, warps, code.loads[128], code.stores[128])
"""


COMPILE_AMD = """
import re, torch
from agc_triton.triton_path.buckets import TensorUnits, ideal_shape
from agc_triton.units import UnitLayout
from benchmarks.lib.compiled import compile_step
for length in (5_000, 14_336, 300_000):
    shape = ideal_shape(TensorUnits(UnitLayout(1, 2, length), True, 0), 4, 2)
    code = compile_step(shape, "adam", 0, 2, torch.float32, "gfx942").asm["amdgcn"]
    print(shape.num_warps, *re.findall(r"max_flat_workgroup_size: *(\\d+)", code))
"""


def run_compiler(script: str) -> list[list[str]]:
    """The words of each line that a script prints where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_what_spilled_does_not_any_more() -> None:
    lines = run_compiler(COMPILE)
    assert len(lines) == 4
    for _, spill_bytes, warps, loads, stores in lines:
        assert int(spill_bytes) <= 8
        assert int(warps) >= 32
        assert int(loads) > int(stores) > 0


def test_programs_on_amd_gpus_have_as_many_threads() -> None:
    lines = run_compiler(COMPILE_AMD)
    assert len(lines) == 3
    for warps, threads in lines:
        assert int(threads) == 32 * int(warps) <= 1024
