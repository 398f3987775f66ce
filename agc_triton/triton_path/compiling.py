"""What kernels are compiled for: an optimizer and its dtypes, a GPU, a tile shape."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from agc_triton.kernels import abi
from agc_triton.routing import interpreted
from agc_triton.rule import KernelRule
from agc_triton.triton_path.buckets import BucketPlan, TileShape
from agc_triton.triton_path.tiles import MAX_PARTS

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Where rules are that do not name their module.
RULES = "agc_triton.kernels.rules"

# 32 resident warps per multiprocessor on every NVIDIA GPU since Volta; HIP has no such option.
MAX_REGISTERS = 64

# Tensors per preparing program, and elements per round of a summing one.
PREPARE_BLOCK = 128
SUM_COLUMNS = 1024
BEGIN_WARPS = 8
FOLD_WARPS = 4


class Kernel(NamedTuple):
    """What of an optimizer the kernels are compiled for.

    ``flags`` and ``states`` are those of a group; dtypes are real and by role: parameters,
    gradients, states.
    """

    rule: KernelRule
    flags: int
    states: int
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype

    @property
    def compute(self) -> torch.dtype:
        """What norms and updates are computed in."""
        return torch.float64 if self.param == torch.float64 else torch.float32

    def access(self, size: int) -> tuple[int, int, int]:
        """Bytes by role of as many elements as ``size`` bytes of a parameter hold."""
        elements = size // self.param.itemsize
        return size, elements * self.grad.itemsize, elements * self.state.itemsize


def prefetch(shape: TileShape) -> int:
    """Chunks of state asked for before the norms are reduced; none where registers would spill."""
    # Beside five chunks some rules spill; AdamW saves 0.2% by it (NFNet-F0 in fp32 on an H200).
    return 0 if shape.split or shape.rows > 1 or shape.chunks > 4 else 1


class Target(NamedTuple):
    """What a GPU's kernels are compiled for.

    ``hip`` for AMD, whose warps have 64 threads; ``pdl`` where launches may overlap, ``stream``
    where loads and stores take hints for the caches.
    """

    hip: bool
    pdl: bool
    stream: bool

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """That of a device; the interpreter's has nothing."""
        hip = torch.version.hip is not None
        nvidia = device.type == "cuda" and not hip and not interpreted()
        return cls(hip, nvidia and torch.cuda.get_device_capability(device) >= (9, 0), nvidia)

    def options(self, num_warps: int, pdl: bool) -> dict[str, Any]:
        """What Triton is told of warps, registers and overlapping launches."""
        if self.hip:
            return {"num_warps": max(1, num_warps // 2)}
        options = {"num_warps": num_warps, "maxnreg": MAX_REGISTERS}
        return {**options, "launch_pdl": True} if pdl else options


def rule_function(rule: KernelRule, suffix: str = "") -> Any:
    """A rule's function on the device, or the one that prepares for it."""
    module, _, name = rule.name.rpartition(":")
    return getattr(importlib.import_module(module or RULES), name + suffix)


def step_constexprs(
    shape: TileShape,
    kernel: Kernel,
    target: Target,
    skip: bool = False,
    track: bool = False,
    first: bool = True,
    last: bool = True,
) -> dict[str, Any]:
    """Compile-time arguments of `step`, in the order of its signature."""
    rule = kernel.rule
    return {
        "RULE": rule_function(rule),
        "FLAGS": kernel.flags,
        "N_SCALARS": rule.n_scalars,
        "N_PREPARED": rule.prepared,
        "N_STATES": kernel.states,
        "TARGET": abi.GRAD if rule.writes_grad else abi.PARAM,
        "P_DTYPE": DTYPES[kernel.param],
        "G_DTYPE": DTYPES[kernel.grad],
        "S_DTYPE": DTYPES[kernel.state],
        "COMPUTE": DTYPES[kernel.compute],
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "CHUNKS": shape.chunks,
        "VECTOR": shape.vector,
        "STRIDED": shape.strided,
        "SPLIT": shape.split,
        "ACROSS": shape.across,
        "PARTS": triton.next_power_of_2(MAX_PARTS),
        "PREFETCH": prefetch(shape),
        "SKIP": skip,
        "TRACK": track,
        "STREAM": target.stream,
        "PDL": target.pdl,
        "FIRST": first,
        "LAST": last,
    }


def fold_constexprs() -> dict[str, Any]:
    """Compile-time arguments of `fold`."""
    return {"PARTS": triton.next_power_of_2(MAX_PARTS)}


def begin_constexprs(plan: BucketPlan, kernel: Kernel, track: bool = False) -> dict[str, Any]:
    """Compile-time arguments of `begin`, in the order of its signature."""
    rule = kernel.rule
    return {
        "PREPARE": rule_function(rule, "_prepare"),
        "N_SCALARS": rule.n_scalars,
        "N_PREPARED": rule.prepared,
        "P_DTYPE": DTYPES[kernel.param],
        "G_DTYPE": DTYPES[kernel.grad],
        "COMPUTE": DTYPES[kernel.compute],
        "BLOCK": PREPARE_BLOCK,
        "COLUMNS": SUM_COLUMNS,
        "VECTOR": plan.parts_vector,
        "STRIDED": plan.parts_strided,
        "HAS_SPLIT": len(plan.parts) > 0,
        "TRACK": track,
    }
