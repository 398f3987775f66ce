"""Kernel reports say what the compiler says; the kernels that spilled are compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from agc_triton import routing
from agc_triton.triton_path.compiling import Kernel
from benchmarks import kernel_report
from benchmarks.kernel_report import BANDWIDTH, DTYPES, OPTIMIZERS, kernel_of, plan_model
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
        /*00b0*/                   ACQBULK ;
        /*00c0*/                   LDG.E.EF.128 R4, [R2.64] ;
        /*00d0*/                   STG.E.EF.128 [R2.64], R4 ;
        /*00e0*/                   PREEXIT ;
"""


def test_machine_code_is_counted_by_width() -> None:
    assert read_machine_code(USAGE, SASS) == MachineCode(
        registers=64,
        spill_bytes=16,
        loads=Counter({128: 3, 64: 1, 32: 1, 16: 1, 8: 1}),
        stores=Counter({128: 2, 16: 1}),
        evict_first=2,
        waits=1,
        triggers=1,
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
    kernels = {name: kernel_of(name, torch.float32) for name in OPTIMIZERS}
    assert {name: (k.rule.name, k.flags, k.states) for name, k in kernels.items()} == {
        "SGD": ("sgd", 1, 1),
        "Adam": ("adam", 0, 2),
        "AdamW": ("adam", 0, 2),
        "AdamW-amsgrad": ("adam", 1, 3),
        "RMSprop": ("rmsprop", 0, 1),
        "Adagrad": ("adagrad", 0, 1),
        "Adadelta": ("adadelta", 0, 2),
        "Adamax": ("adamax", 0, 2),
        "NAdam": ("nadam", 0, 2),
        "RAdam": ("radam", 0, 2),
        "ASGD": ("asgd", 0, 1),
        "Rprop": ("rprop", 0, 2),
        "RMSprop-momentum": ("rmsprop", 2, 2),
        "RMSprop-centered-momentum": ("rmsprop", 3, 3),
    }


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every kernel has 40 registers and reads and writes p, g and states once in full width.

    With tracking it has two more, spills four bytes more and has a store more.
    """
    asked: list[tuple[Any, ...]] = []

    def code(
        shape: Any, kernel: Kernel, arch: str, first: bool, last: bool, track: bool = False
    ) -> MachineCode:
        asked.append((shape, kernel, arch))
        width, states = 8 * kernel.param.itemsize * shape.vector, kernel.states
        times = shape.rows * shape.columns * shape.chunks // (32 * shape.num_warps * shape.vector)
        loads = Counter({width: (2 + states) * times, 7: 1})
        stores = Counter({width: (1 + states) * times})
        if track:
            stores[7] = 1
        waits, triggers = (2 - first, 1 - last) if arch == "90" else (0, 0)
        needed = (42, 12) if track else (40, 8)
        return MachineCode(*needed, loads, stores, (3 + 2 * states) * times, waits, triggers)

    monkeypatch.setattr(kernel_report, "step_code", code)
    monkeypatch.setattr(kernel_report, "compile_begin", lambda *_: None)
    return asked


@pytest.mark.parametrize(
    ("optimizer", "dtype", "models"),
    [
        ("SGD", "bf16", ["resnet50"]),
        ("AdamW", "fp32", MODELS),
        ("AdamW-amsgrad", "bf16", ["vit_base_patch16_224"]),
    ],  # of one, two and three states
)
def test_a_row_per_bucket_of_every_model(
    optimizer: str, dtype: str, models: list[str], nothing_compiled: list[tuple[Any, ...]]
) -> None:
    table = kernel_report.report(models, [optimizer], [dtype], ["80", "90"])
    kernel, itemsize = kernel_of(optimizer, DTYPES[dtype]), DTYPES[dtype].itemsize
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
    assert set(table["model"]) == set(models)
    assert (table["loads_per_element"] == 2 + kernel.states).all()
    assert (table["stores_per_element"] == 1 + kernel.states).all()
    assert table["load_bits"].str.endswith(" 1x7").all()
    assert (table["evict_first"] == 1).all()
    assert (table[table["arch"] == "sm_90"]["dependent_launch"] == "yes").all()
    assert (table[table["arch"] == "sm_80"]["dependent_launch"] == "no").all()
    tracked = table[["tracked_registers", "tracked_spill_bytes", "tracked_stores"]]
    assert set(tracked.itertuples(index=False, name=None)) == {(42, 12, 1)}
    assert set(table["occupancy"]) <= {n / 64 for n in range(32, 65)}
    assert {asked[1] for asked in nothing_compiled} == {kernel}

    summary = kernel_report.summary(table)
    assert len(summary) == 2 * len(models)
    assert set(summary["worst_spill_bytes"]) == {8}
    assert set(summary["tracked_spill_bytes"]) == {4}


def test_kernels_are_not_reported_where_they_are_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(routing, "interpreted", lambda: True)
    with pytest.raises(SystemExit):
        kernel_report.main(["--out", str(tmp_path / "rows.csv")])
    assert "unset it" in capsys.readouterr().err


# Compiled in one other process, where kernels are not interpreted; a line per result, by subject.
COMPILE = """
import inspect, re, torch, triton
from triton.runtime import jit
from agc_triton.triton_path.buckets import TensorUnits, TileShape, ideal_shape, plan_buckets
from agc_triton.triton_path.compiling import step_constexprs
from agc_triton.units import UnitLayout
from benchmarks.kernel_report import kernel_of
from benchmarks.lib.compiled import compile_begin, compile_fold, compile_step
from benchmarks.lib.compiled import resident_warps, step_code, target_of

def shape_of(length, itemsize, states):
    return ideal_shape(TensorUnits(UnitLayout(1, 1, 2, length), True, 0), itemsize, states)

# Units whose kernels spilled once: 16 warps of three chunks beside three states, 16-bit tiles,
# five chunks.
for optimizer, length, dtype, arch in (
    ("AdamW-amsgrad", 6144, torch.float32, "90"),
    ("AdamW", 1 << 20, torch.bfloat16, "80"),
    ("Adamax", 2304, torch.float32, "80"),
):
    kernel = kernel_of(optimizer, dtype)
    shape = shape_of(length, dtype.itemsize, kernel.states)
    code = step_code(shape, kernel, arch)
    assert code.evict_first == code.loads[128] + code.stores[128]
    assert code.waits == (arch == "90") and not code.triggers
    warps = resident_warps(code.registers, shape.num_warps)
    print("spills", code.spill_bytes, warps, code.loads[128], code.stores[128])

# Tracked steps write a ratio per unit: one unit in a tile, many, and one in many tiles.
kernel = kernel_of("SGD", torch.float32)
for length in (768, 27, 1 << 20):
    shape = shape_of(length, 4, kernel.states)
    plain, tracked = (step_code(shape, kernel, "90", track=track) for track in (False, True))
    more = tracked.stores - plain.stores
    print("tracked", tracked.spill_bytes, *(f"{n}x{bits}" for bits, n in more.items()))

shape = shape_of(14_336, 4, 2)
code = compile_step(shape, kernel_of("AdamW", torch.float32), "gfx942").asm["amdgcn"]
print("amd", shape.num_warps, *re.findall(r"max_flat_workgroup_size: *(\\d+)", code))

kernel, shape = kernel_of("SGD", torch.float32), TileShape(1, 128, 2, 1, 4, False, False)
for arch, first, last in (
    ("80", False, False),
    ("90", True, False),
    ("90", False, False),
    ("90", False, True),
    ("90", True, True),
):
    code = step_code(shape, kernel, arch, first, last)
    print("order", arch, code.waits, code.triggers)

# Of units that ranks share: all that a step launches for them.
tensors = [TensorUnits(UnitLayout(1, 1, 2, 1 << 17), True, 0, 0)]
plan = plan_buckets(tensors, 4, kernel.states)
(bucket,) = plan.buckets
for arch in ("90", "gfx942"):
    compile_begin(plan, kernel, arch, track=True)
    launches = compile_begin(plan, kernel, arch), compile_fold(kernel, arch)
    compile_step(bucket.shape, kernel, arch)
    print("shared", arch, len(plan.folds), *(launch.name for launch in launches))

# What Triton calls for jit_post_compile_hook and jit_cache_hook; it knows functions from 3.7 on.
class Anything: pass
for values in (
    [triton.language.standard.softmax],
    step_constexprs(shape, kernel, target_of("90")).values(),
):
    given = {"constants": {(i,): v for i, v in enumerate(values)}, "attrs": {}}
    for name in inspect.signature(jit.serialize_specialization_data).parameters:
        given.setdefault(name, Anything() if name in ("options", "target") else "")
    try:
        print("described", bool(jit.serialize_specialization_data(**given)))
    except TypeError:
        print("described", False)
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[list[str]]]:
    """The words of each line that ``COMPILE`` prints, by the first of them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0  # what it wrote on stderr is shown
    lines = defaultdict[str, list[list[str]]](list)
    for subject, *words in map(str.split, done.stdout.splitlines()):
        lines[subject].append(words)
    return lines


def test_what_spilled_does_not_any_more(compiled: dict[str, list[list[str]]]) -> None:
    assert len(compiled["spills"]) == 3
    for spill_bytes, warps, loads, stores in compiled["spills"]:
        assert int(spill_bytes) <= 8
        assert int(warps) >= 32
        assert int(loads) > int(stores) > 0


def test_a_tracked_step_has_one_store_more(compiled: dict[str, list[list[str]]]) -> None:
    assert compiled["tracked"] == [["0", "1x32"]] * 3


def test_programs_on_amd_gpus_have_as_many_threads(compiled: dict[str, list[list[str]]]) -> None:
    ((warps, threads),) = compiled["amd"]
    assert int(threads) == 32 * int(warps) <= 1024


def test_launches_overlap_where_they_can(compiled: dict[str, list[list[str]]]) -> None:
    # The first waits at its beginning, the others at both of their ends; the last starts nobody.
    assert compiled["order"] == [
        ["80", "0", "0"],
        *(["90", *pair] for pair in (("1", "1"), ("2", "1"), ("2", "0"), ("1", "0"))),
    ]


def test_what_ranks_share_compiles_too(compiled: dict[str, list[list[str]]]) -> None:
    assert compiled["shared"] == [[arch, "2", "begin", "fold"] for arch in ("90", "gfx942")]


def test_hooks_can_describe_our_kernels_where_they_can_any_that_take_a_function(
    compiled: dict[str, list[list[str]]],
) -> None:
    (theirs,), (ours,) = compiled["described"]
    assert ours == theirs == str(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))
