"""What the compiler makes of every kernel that a step launches, for any model, without a GPU.

    python -m benchmarks.kernel_report [--models ...] [--optimizers ...] [--arch 80 90] [--out ...]

Each bucket's kernel is compiled for the architecture and its machine code is counted: registers,
spills, resident warps, data accesses and their width, bytes per parameter, and what a tracked step
adds; and for each model the launches per step and the time its bytes take at the memory bandwidth
in the data sheets, which a copy reaches nine tenths of.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton
from torch.nn import Parameter
from tqdm import tqdm

from agc_triton import routing
from agc_triton.optim import OPTIMIZERS as REGISTRY
from agc_triton.triton_path.buckets import BucketPlan, TensorUnits, plan_buckets
from agc_triton.triton_path.compiling import Kernel
from agc_triton.triton_path.launch_group import kernel_layout
from benchmarks.lib.arguments import check_file, parser_of
from benchmarks.lib.compiled import (
    MAX_WARPS_PER_SM,
    compile_begin,
    compile_step,
    resident_warps,
    step_code,
)
from benchmarks.lib.rows import write
from benchmarks.lib.workloads import TABLES, load_shapes

# Classes and options; AdamW's kernels are Adam's, found in the cache.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (cls, {}) for name, cls in REGISTRY.items()},
    "SGD": (REGISTRY["SGD"], {"lr": 0.1, "momentum": 0.9}),
    "AdamW-amsgrad": (REGISTRY["AdamW"], {"amsgrad": True}),
    "RMSprop-momentum": (REGISTRY["RMSprop"], {"momentum": 0.9}),
    "RMSprop-centered-momentum": (REGISTRY["RMSprop"], {"centered": True, "momentum": 0.9}),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Compute capabilities that Triton's assembler knows.
ARCHS = ("75", "80", "86", "87", "89", "90", "100", "120")

# Peak memory bandwidth, TB/s (NVIDIA data sheets: A100 SXM 80 GB, H100 SXM, H200).
BANDWIDTH = {"A100": 2.039, "H100": 3.35, "H200": 4.8}


@functools.cache
def kernel_of(optimizer: str, dtype: torch.dtype) -> Kernel:
    """What one of `OPTIMIZERS` asks of the kernels for parameters of a dtype."""
    make, options = OPTIMIZERS[optimizer]
    made = make([Parameter(torch.zeros(1))], **options)
    rule, group = made.rule.kernel, made.param_groups[0]
    return Kernel(rule, rule.flags(group), len(rule.states(group)), dtype, dtype, dtype)


@functools.cache
def plan_model(model: str, dtype: torch.dtype, states: int, groups: int = 1) -> BucketPlan:
    """The plan for a model's parameters, all aligned and contiguous, dealt out to ``groups``."""
    tensors = []
    for i, shape in enumerate(load_shapes(model)):
        tensor = torch.empty(shape, device="meta")
        tensors.append(TensorUnits(kernel_layout(tensor, None), True, i % groups))
    return plan_buckets(tensors, dtype.itemsize, states)


def bucket_row(plan: BucketPlan, at: int, kernel: Kernel, arch: str) -> dict[str, Any]:
    """One launch of a step: its tile shape and its machine code."""
    bucket, elements = plan.buckets[at], sum(bucket.elements for bucket in plan.buckets)
    shape, dtype, states = bucket.shape, kernel.param, kernel.states
    first, last = at == 0, at == len(plan.buckets) - 1
    code = step_code(shape, kernel, arch, first, last)
    tracked = step_code(shape, kernel, arch, first, last, track=True)
    ordered = (code.waits, code.triggers) == (1 if first else 2, 0 if last else 1)
    warps = resident_warps(code.registers, shape.num_warps)
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
        "warps_per_sm": warps,
        "occupancy": warps / MAX_WARPS_PER_SM,
        "load_bits": _listed(code.loads),
        "store_bits": _listed(code.stores),
        "access_bits": width,
        "evict_first": code.evict_first / (code.loads[width] + code.stores[width]),
        "dependent_launch": "yes" if ordered else "no",
        "loads_per_element": role_loads if exact else float("nan"),
        "stores_per_element": role_stores if exact else float("nan"),
        "tracked_registers": tracked.registers,
        "tracked_spill_bytes": tracked.spill_bytes,
        # One is expected: 4 bytes per unit.
        "tracked_stores": tracked.stores.total() - code.stores.total(),
        "bytes_per_parameter": bucket.bytes_moved(dtype.itemsize, dtype.itemsize, states)
        / bucket.elements,
    }


def _listed(accesses: Counter[int]) -> str:
    """Instructions by their width, widest first."""
    widest_first = sorted(accesses.items(), reverse=True)
    return " ".join(f"{count}x{width}" for width, count in widest_first)


def report(
    models: Sequence[str], optimizers: Sequence[str], dtypes: Sequence[str], archs: Sequence[str]
) -> pd.DataFrame:
    """A row per model, optimizer, dtype, architecture and bucket."""
    rows = []
    work = list(product(models, optimizers, dtypes, archs))
    for model, optimizer, dtype_name, arch in tqdm(work, desc="kernels", disable=None):
        dtype = DTYPES[dtype_name]
        kernel = kernel_of(optimizer, dtype)
        plan = plan_model(model, dtype, kernel.states)
        many = plan_model(model, dtype, kernel.states, groups=50)
        moved = sum(
            b.bytes_moved(dtype.itemsize, dtype.itemsize, kernel.states) for b in plan.buckets
        )
        for track in (False, True):
            compile_begin(plan, kernel, arch, track)
        for at in range(len(plan.buckets)):
            rows.append(
                {
                    "model": model,
                    "optimizer": optimizer,
                    "dtype": dtype_name,
                    "arch": f"sm_{arch}",
                    # One copy of the tables, `begin`, and `step` once per bucket.
                    "launches": 2 + len(plan.buckets),
                    "launches_50_groups": 2 + len(many.buckets),
                    **bucket_row(plan, at, kernel, arch),
                    **{f"predicted_ms_{gpu}": moved / tb / 1e9 for gpu, tb in BANDWIDTH.items()},
                    "triton": triton.__version__,
                }
            )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One line per model, optimizer, dtype and architecture; the worst of buckets over 5%.

    ``tracked_spill_bytes`` are those that a tracked step spills more.
    """
    keys = ["model", "optimizer", "dtype", "arch"]
    whole = table.groupby(keys, sort=False)
    more = table["tracked_spill_bytes"] - table["spill_bytes"]
    large = table.assign(more=more)[table["share"] > 0.05].groupby(keys, sort=False)
    wide = table[table["aligned"] & (table["class"] == "registers")].groupby(keys, sort=False)
    return pd.DataFrame(
        {
            "launches": whole["launches"].max(),
            "launches_50_groups": whole["launches_50_groups"].max(),
            "aligned_in_registers": wide["share"].sum(),
            "worst_spill_bytes": large["spill_bytes"].max(),
            "tracked_spill_bytes": large["more"].max(),
            "least_warps_per_sm": large["warps_per_sm"].min(),
            "bytes_per_parameter": large["bytes_per_parameter"].max(),
            **{f"predicted_ms_{gpu}": whole[f"predicted_ms_{gpu}"].max() for gpu in BANDWIDTH},
        }
    ).reset_index()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the summary and write every row."""
    models = sorted(path.stem for path in TABLES.glob("*.csv"))
    parser = parser_of("kernel_report", __doc__)
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--arch", nargs="+", default=["80", "90"], choices=ARCHS)
    parser.add_argument("--out", type=Path, default=Path("out/kernel_report.csv"))
    args = parser.parse_args(argv)
    check_file(parser, args.out)
    if routing.interpreted():
        parser.error("kernels are not compiled under TRITON_INTERPRET=1; unset it")
    table = report(args.models, args.optimizers, args.dtypes, args.arch)
    write(table, args.out)
    print(summary(table).to_string(index=False, float_format="{:.4g}".format))
    adamw = kernel_of("AdamW", torch.float32)
    plan = plan_model(args.models[0], torch.float32, adamw.states)
    compile_step(plan.buckets[-1].shape, adamw, "gfx942")
    compile_begin(plan, adamw, "gfx942")
    print(f"AdamW also compiles for gfx942. Every bucket's row is in {args.out}")


if __name__ == "__main__":
    main()
