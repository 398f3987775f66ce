"""Kernels compiled for a GPU that is not there, and what their machine code needs and does."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agc_triton.kernels.begin import begin
from agc_triton.kernels.fold import fold
from agc_triton.kernels.step import step
from agc_triton.triton_path import compiling
from agc_triton.triton_path.buckets import BucketPlan, TileShape

# Per multiprocessor (NVIDIA's tuning guides: A100, H100, H200).
REGISTERS_PER_SM = 65536
MAX_WARPS_PER_SM = 64
MAX_PROGRAMS_PER_SM = 32


class MachineCode(NamedTuple):
    """What one compiled kernel needs and does; accesses by width in bits, per thread.

    ``evict_first`` counts those of any width that leave the caches first, ``waits`` and
    ``triggers`` the instructions that order overlapping compiling.
    """

    registers: int
    spill_bytes: int
    loads: Counter[int]
    stores: Counter[int]
    evict_first: int
    waits: int
    triggers: int


@functools.cache
def compile_step(
    shape: TileShape,
    kernel: compiling.Kernel,
    arch: str,
    first: bool = True,
    last: bool = True,
    track: bool = False,
) -> Any:
    """`step` for one tile shape, by its place in the step; ``arch`` is 80, 90, ... or gfx942."""
    target = target_of(arch)
    place = {"first": first, "last": last}
    constexprs = compiling.step_constexprs(shape, kernel, target, track=track, **place)
    options = target.options(shape.num_warps, target.pdl)
    return _compile(step, constexprs, kernel.compute, options, arch)


@functools.cache
def compile_fold(kernel: compiling.Kernel, arch: str) -> Any:
    """`fold`, for units that ranks share."""
    options = target_of(arch).options(compiling.FOLD_WARPS, pdl=False)
    return _compile(fold, compiling.fold_constexprs(), kernel.compute, options, arch)


def target_of(arch: str) -> compiling.Target:
    """What kernels are compiled for there."""
    hip = arch.startswith("gfx")
    return compiling.Target(hip, pdl=not hip and int(arch) >= 90, stream=not hip)


def compile_begin(
    plan: BucketPlan, kernel: compiling.Kernel, arch: str, track: bool = False
) -> Any:
    """`begin`, which every step of this plan opens with."""
    constexprs = compiling.begin_constexprs(plan, kernel, track)
    return _compile_begin(tuple(constexprs.items()), kernel.compute, arch)


@functools.cache
def _compile_begin(constexprs: tuple[tuple[str, Any], ...], compute: torch.dtype, arch: str) -> Any:
    options = target_of(arch).options(compiling.BEGIN_WARPS, pdl=False)
    return _compile(begin, dict(constexprs), compute, options, arch)


_TYPES = {
    **dict.fromkeys(
        (*("tiles_ptr", "tensors_ptr", "addresses_ptr", "pointers_ptr", "folds_ptr"),),
        "*i64",
    ),
    **dict.fromkeys(("prepared_ptr", "groups_ptr"), "*fp64"),
    **dict.fromkeys(("grad_scale_ptr", "found_inf_ptr", "ratios_ptr"), "*fp32"),
    **dict.fromkeys(("skips_ptr", "numbers_ptr"), "*i32"),
    **dict.fromkeys(("number", "n_tensors", "n_prepare"), "i32"),
}


def _compile(
    kernel: Any, constexprs: dict[str, Any], compute: torch.dtype, options: Any, arch: str
) -> Any:
    sums = "*fp64" if compute == torch.float64 else "*fp32"
    names = [name for name in kernel.arg_names if name not in constexprs]
    types = {name: _TYPES.get(name, sums) for name in names}  # sums and those that ranks add up
    signature = {**types, **dict.fromkeys(constexprs, "constexpr")}
    # Tables start at addresses that torch's allocators align to 64 bytes or more.
    aligned = [(i,) for i, name in enumerate(names) if types[name].startswith("*")]
    attributes = {position: [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(kernel, signature, constexprs, attributes)
    hip = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch), 32)
    return triton.compile(source, target=target, options=options)


@functools.cache
def step_code(
    shape: TileShape,
    kernel: compiling.Kernel,
    arch: str,
    first: bool = True,
    last: bool = True,
    track: bool = False,
) -> MachineCode:
    """Resources and accesses of `step` for one tile shape on an NVIDIA GPU."""
    compiled = compile_step(shape, kernel, arch, first, last, track)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return read_machine_code(dump("-res-usage"), dump("-sass"))


def read_machine_code(usage: str, sass: str) -> MachineCode:
    """What cuobjdump's -res-usage and -sass say."""
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers is not None
    return MachineCode(
        registers=int(registers[1]),
        spill_bytes=int(registers[2]),
        loads=_accesses(sass, "LDG"),
        stores=_accesses(sass, "STG"),
        evict_first=len(re.findall(r"\b(?:LDG|STG)\.E\.EF\b", sass)),
        waits=len(re.findall(r"\bACQBULK\b", sass)),
        triggers=len(re.findall(r"\bPREEXIT\b", sass)),
    )


def _accesses(sass: str, instruction: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for suffix in re.findall(rf"\b{instruction}\.E([.\w]*)", sass):
        width = re.search(r"\b(8|16|64|128)\b", suffix.replace("U8", "8").replace("U16", "16"))
        found[int(width[1]) if width else 32] += 1
    return found


def resident_warps(registers: int, num_warps: int) -> int:
    """Warps per multiprocessor that registers and the limit on programs allow."""
    per_warp = -(-registers // 8) * 8 * 32
    programs = min(REGISTERS_PER_SM // (per_warp * num_warps), MAX_PROGRAMS_PER_SM)
    return min(programs * num_warps, MAX_WARPS_PER_SM)
