"""What the compiler makes of every kernel that a step launches, for any model, without a GPU.

    python -m benchmarks.kernel_report [--models ...] [--optimizers ...] [--arch 80 90] [--out ...]

Each bucket's kernel is compiled for the architecture and its machine code is counted: registers,
spills, resident warps, data accesses and their width, bytes per parameter; and for each model the
launches per step and the time its bytes take at the memory bandwidth in the data sheets.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agc_triton.buckets import Bucket, BucketPlan, TensorUnits, TileShape, plan_buckets
from agc_triton.kernels import launch
from agc_triton.kernels.begin import begin
from agc_triton.kernels.step import step
from agc_triton.units import memory_order, unit_layout
from benchmarks.shapes import TABLES, load_shapes

# Rule, flags and number of states of each optimizer, as its class asks for them.
OPTIMIZERS: dict[str, tuple[str, int, int]] = {
    "SGD": ("sgd", 1, 1),  # with momentum
    "Adam": ("adam", 0, 2),
    "AdamW": ("adam", 0, 2),
    "RMSprop": ("rmsprop", 0, 1),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Peak memory bandwidth, TB/s, and maximal resident warps per multiprocessor (NVIDIA data sheets
# and tuning guides: A100 SXM 80 GB, H100 SXM, H200).
BANDWIDTH = {"A100": 2.039, "H100": 3.35, "H200": 4.8}
REGISTERS_PER_SM = 65536
MAX_WARPS_PER_SM = 64
MAX_PROGRAMS_PER_SM = 32


class MachineCode(NamedTuple):
    """What one compiled kernel needs and does; accesses by width in bits, per thread."""

    registers: int
    spill_bytes: int
    loads: Counter[int]
    stores: Counter[int]


def plan_model(model: str, dtype: torch.dtype, states: int, groups: int = 1) -> BucketPlan:
    """The plan for a model's parameters, all aligned and contiguous, dealt out to ``groups``."""
    tensors = []
    for i, shape in enumerate(load_shapes(model)):
        tensor = torch.empty(shape, device="meta")
        order = memory_order(tensor)
        assert order is not None
        tensors.append(TensorUnits(unit_layout(tensor.shape, order, None), True, i % groups))
    return plan_buckets(tensors, dtype.itemsize, states)


@functools.cache
def compile_step(
    shape: TileShape, rule: str, flags: int, states: int, dtype: torch.dtype, arch: str
) -> Any:
    """`step` for one tile shape; ``arch`` is 80, 90, ... or gfx942."""
    constants = launch.step_constants(shape, rule, flags, states, dtype)
    return _compile(step, constants, dtype, shape.num_warps, arch)


def compile_begin(plan: BucketPlan, rule: str, dtype: torch.dtype, arch: str) -> Any:
    """`begin` with everything switched on."""
    constants = launch.begin_constants(plan, rule, dtype, True, True, True)
    return _compile(begin, constants, dtype, launch.BEGIN_WARPS, arch)


_TYPES = {
    **dict.fromkeys(
        ("tiles_ptr", "tensors_ptr", "addresses_ptr", "pointers_ptr", "skipped_ptr"), "*i64"
    ),
    **dict.fromkeys(("constants_ptr", "groups_ptr"), "*fp64"),
    **dict.fromkeys(("steps_ptr", "grad_scale_ptr", "found_inf_ptr"), "*fp32"),
    **dict.fromkeys(("n_tensors", "n_prepare"), "i32"),
}


def _compile(
    kernel: Any, constants: dict[str, Any], dtype: torch.dtype, num_warps: int, arch: str
) -> Any:
    partials = "*fp64" if dtype == torch.float64 else "*fp32"
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: partials if name == "partials_ptr" else _TYPES[name] for name in names}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    # Tables start at addresses that torch's allocators align to 64 bytes or more.
    aligned = [(i,) for i, name in enumerate(names) if types[name].startswith("*")]
    attributes = {position: [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options: dict[str, Any] = {"num_warps": num_warps}
    if arch.startswith("gfx"):
        return triton.compile(source, target=GPUTarget("hip", arch, 64), options=options)
    options["maxnreg"] = launch.MAX_REGISTERS
    return triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)


def read_machine_code(compiled: Any) -> MachineCode:
    """Count a CUDA kernel's resources and global accesses in its SASS."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers is not None
    return MachineCode(
        int(registers[1]), int(registers[2]), _accesses(sass, "LDG"), _accesses(sass, "STG")
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


def bucket_row(
    bucket: Bucket, optimizer: str, dtype: torch.dtype, arch: str, elements: int
) -> dict[str, Any]:
    """One launch of a step: its tile shape and its machine code."""
    rule, flags, states = OPTIMIZERS[optimizer]
    shape = bucket.shape
    code = read_machine_code(compile_step(shape, rule, flags, states, dtype, arch))
    # How often each thread touches one role, where it reads its share `vector` elements at a time.
    times = shape.rows * shape.columns * shape.chunks // (32 * shape.num_warps * shape.vector)
    width = 8 * dtype.itemsize * shape.vector
    role_loads, role_stores = code.loads[width] / times, code.stores[width] / times
    exact = role_loads == 2 + states and role_stores == 1 + states
    return {
        "class": "split" if shape.split else "registers" if shape.rows == 1 else "rows",
        "aligned": shape.vector > 1,
        "tensors": len(bucket.tensors),
        "units": bucket.units,
        "elements": bucket.elements,
        "share": bucket.elements / elements,
        "rows": shape.rows,
        "columns": shape.columns,
        "chunks": shape.chunks,
        "num_warps": shape.num_warps,
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "warps_per_sm": resident_warps(code.registers, shape.num_warps),
        "access_bits": width,
        "loads_per_element": role_loads if exact else float("nan"),
        "stores_per_element": role_stores if exact else float("nan"),
        "bytes_per_parameter": bucket.bytes_moved(dtype.itemsize, states) / bucket.elements,
    }


def report(
    models: Sequence[str], optimizers: Sequence[str], dtypes: Sequence[str], archs: Sequence[str]
) -> pd.DataFrame:
    """A row per model, optimizer, dtype, architecture and bucket."""
    rows = []
    work = [(m, o, d, a) for m in models for o in optimizers for d in dtypes for a in archs]
    for model, optimizer, dtype_name, arch in tqdm(work, desc="kernels", disable=None):
        dtype, states = DTYPES[dtype_name], OPTIMIZERS[optimizer][2]
        plan = plan_model(model, dtype, states)
        many = plan_model(model, dtype, states, groups=50)
        elements = sum(bucket.elements for bucket in plan.buckets)
        moved = sum(b.bytes_moved(dtype.itemsize, states) for b in plan.buckets)
        compile_begin(plan, OPTIMIZERS[optimizer][0], dtype, arch)
        for bucket in plan.buckets:
            rows.append(
                {
                    "model": model,
                    "optimizer": optimizer,
                    "dtype": dtype_name,
                    "arch": f"sm_{arch}",
                    # One copy of the tables, `begin`, and `step` once per bucket.
                    "launches": 2 + len(plan.buckets),
                    "launches_50_groups": 2 + len(many.buckets),
                    **bucket_row(bucket, optimizer, dtype, arch, elements),
                    **{f"floor_ms_{gpu}": moved / tb / 1e9 for gpu, tb in BANDWIDTH.items()},
                    "triton": triton.__version__,
                }
            )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One line per model, optimizer, dtype and architecture; the worst of buckets over 5%."""
    keys = ["model", "optimizer", "dtype", "arch"]
    large = table[table["share"] > 0.05].groupby(keys, sort=False)
    wide = table[table["aligned"] & (table["class"] == "registers")].groupby(keys, sort=False)
    return pd.DataFrame(
        {
            "launches": table.groupby(keys, sort=False)["launches"].max(),
            "launches_50_groups": table.groupby(keys, sort=False)["launches_50_groups"].max(),
            "aligned_in_registers": wide["share"].sum(),
            "worst_spill_bytes": large["spill_bytes"].max(),
            "least_warps_per_sm": large["warps_per_sm"].min(),
            "bytes_per_parameter": large["bytes_per_parameter"].max(),
            "floor_ms_H100": table.groupby(keys, sort=False)["floor_ms_H100"].max(),
        }
    ).reset_index()


def main() -> None:
    """Print the summary and write every row."""
    models = sorted(path.stem for path in TABLES.glob("*.csv"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=DTYPES)
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="compute capabilities")
    parser.add_argument("--out", type=Path, default=Path("out/kernel_report.csv"))
    args = parser.parse_args()
    if launch.interpreted():
        parser.error("kernels are not compiled under TRITON_INTERPRET=1; unset it")
    table = report(args.models, args.optimizers, args.dtypes, args.arch)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    print(summary(table).to_string(index=False, float_format="{:.4g}".format))
    plan = plan_model(args.models[0], torch.float32, 2)
    compile_step(plan.buckets[-1].shape, "adam", 0, 2, torch.float32, "gfx942")
    compile_begin(plan, "adam", torch.float32, "gfx942")
    print(f"AdamW also compiles for gfx942. Every bucket's row is in {args.out}")


if __name__ == "__main__":
    main()
