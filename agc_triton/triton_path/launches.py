"""Launches of one fused step: arguments are bound once, a step only fires them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from agc_triton.kernels import abi, rules
from agc_triton.kernels.begin import begin
from agc_triton.kernels.step import step
from agc_triton.triton_path.buckets import MAX_PARTS

if TYPE_CHECKING:
    from agc_triton.nonfinite import SkippedUnits
    from agc_triton.triton_path.buckets import BucketPlan, TileShape
    from agc_triton.triton_path.tables import Tables

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# 32 resident warps per multiprocessor on every NVIDIA GPU since Volta; HIP has no such option.
MAX_REGISTERS = 64

# Tensors per preparing program, and elements per round of a summing one.
PREPARE_BLOCK = 128
PARTS_COLUMNS = 1024
BEGIN_WARPS = 8


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return not isinstance(step, triton.runtime.JITFunction)


def prefetch(shape: TileShape) -> int:
    """Chunks of state asked for before the norms are reduced; none where registers would spill."""
    return 0 if shape.split or shape.rows > 1 else 1


def compile_options(num_warps: int, hip: bool) -> dict[str, Any]:
    """What Triton is told of registers and of warps, which on AMD GPUs have 64 threads each."""
    if hip:
        return {"num_warps": max(1, num_warps // 2)}
    return {"num_warps": num_warps, "maxnreg": MAX_REGISTERS}


def step_constants(
    shape: TileShape, rule: str, flags: int, states: int, dtype: torch.dtype, skip: bool = False
) -> dict[str, Any]:
    """Compile-time arguments of `step`, in the order of its signature."""
    return {
        "RULE": getattr(rules, rule),
        "FLAGS": flags,
        "STATES": states,
        "TARGET": abi.GRAD if rule == "clip" else abi.PARAM,
        "DTYPE": DTYPES[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "CHUNKS": shape.chunks,
        "VECTOR": shape.vector,
        "STRIDED": shape.strided,
        "SPLIT": shape.split,
        "PARTS": triton.next_power_of_2(MAX_PARTS),
        "PREFETCH": prefetch(shape),
        "SKIP": skip,
    }


def begin_constants(plan: BucketPlan, rule: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of `begin`, in the order of its signature."""
    return {
        "PREPARE": getattr(rules, f"{rule}_prepare"),
        "DTYPE": DTYPES[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": PREPARE_BLOCK,
        "COLUMNS": PARTS_COLUMNS,
        "VECTOR": plan.parts_vector,
        "STRIDED": plan.parts_strided,
        "HAS_SPLIT": len(plan.parts) > 0,
    }


class Launch:
    """One kernel with its arguments; compiled when first fired, then started without the JIT."""

    def __init__(
        self,
        kernel: Any,
        programs: int,
        args: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int,
    ) -> None:
        self.kernel = kernel
        self.grid = (programs, 1, 1)
        self.args = args
        self.constants = constants
        self.options = {"num_warps": warps}
        if not interpreted():
            self.options = compile_options(warps, torch.version.hip is not None)
        self._start: Any = None
        self._all_args = (*args, *constants.values())

    def fire(self) -> None:
        """Start the kernel on the current stream.

        Raises:
            RuntimeError: it cannot be compiled or started.
        """
        try:
            if self._start is not None:
                self._start(*self._all_args)
                return
            compiled = self.kernel[self.grid](*self.args, **self.constants, **self.options)
        except Exception as error:  # whatever the compiler, its tools or the driver raise
            raise RuntimeError(
                f"the kernel {self.kernel.__name__!r} ({self.grid[0]} programs, {self.options})"
                f" failed with {type(error).__name__}: {error}; weights, states and step counts may"
                " be updated in part: go on from a checkpoint, or with backend='torch'"
            ) from error
        if compiled is not None:  # the interpreter compiles nothing
            self._start = compiled[self.grid]

    @property
    def loaded(self) -> bool:
        """Whether it starts without being compiled and loaded, which no capture allows."""
        return self._start is not None or interpreted()

    def replaced(self, **changes: Any) -> Launch:
        """The same kernel, loaded if this one is, with other arguments."""
        twin = copy.copy(self)
        for name, value in changes.items():
            twin.replace(name, value)
        return twin

    def replace(self, name: str, value: Any) -> None:
        """Exchange one argument for another of the same type."""
        position = self.kernel.arg_names.index(name)
        if self._all_args[position] is not value:
            changed = [*self._all_args]
            changed[position] = value
            self._all_args = tuple(changed)
            self.args = self._all_args[: len(self.args)]


class StepLauncher:
    """The launches of one step over a plan: `begin`, then `step` once per bucket.

    ``skipped`` leaves alone and counts the units whose gradient norm is not finite.
    """

    def __init__(
        self,
        plan: BucketPlan,
        tables: Tables,
        rule: str,
        flags: int,
        dtype: torch.dtype,
        skipped: SkippedUnits | None = None,
    ) -> None:
        self.plan, self.tables, self.rule, self.dtype = plan, tables, rule, dtype
        n, device = len(plan.fields), tables.device
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.fields = torch.from_numpy(plan.fields).to(device)
        self.constants = torch.empty(n * abi.CONSTANTS, dtype=torch.float64, device=device)
        self.partials = torch.empty(2 * max(plan.slots, 1), dtype=compute, device=device)
        self.parts = torch.from_numpy(plan.parts).to(device)
        # Stand for a grad_scale or found_inf that is not given: one `begin` serves all steps.
        self.no_scale = torch.ones((), dtype=torch.float32, device=device)
        self.no_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.begin = self._begin()
        states = tables.roles - abi.FIRST_STATE
        counts = tables.addresses  # an int64 pointer that is not read
        if skipped is not None:
            # Launches follow each other, so that programs of several can add to the same count.
            counts = skipped.slots(device, max(len(bucket.tiles) for bucket in plan.buckets))
        self.steps = [
            Launch(
                step,
                len(bucket.tiles),
                (
                    torch.from_numpy(bucket.tiles).to(device),
                    self.fields,
                    tables.addresses,
                    self.constants,
                    self.partials,
                    counts,
                    n,
                ),
                step_constants(bucket.shape, rule, flags, states, dtype, skipped is not None),
                bucket.shape.num_warps,
            )
            for bucket in plan.buckets
        ]

    def twin(self, tables: Tables) -> StepLauncher:
        """The same launches over other tables."""
        twin = copy.copy(self)
        twin.tables = tables
        addresses, groups, pointers = tables.addresses, tables.values, tables.pointers
        twin.begin = self.begin.replaced(
            addresses_ptr=addresses, groups_ptr=groups, pointers_ptr=pointers
        )
        twin.steps = [launch.replaced(addresses_ptr=addresses) for launch in self.steps]
        return twin

    def fire(self, grad_scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> None:
        """Run the step; ``grad_scale`` and ``found_inf`` are fp32 on the same device.

        Raises:
            RuntimeError: a kernel that would have to be loaded while a CUDA graph is captured.
        """
        scale = self.no_scale if grad_scale is None else grad_scale
        inf = self.no_inf if found_inf is None else found_inf
        self.begin.replace("grad_scale_ptr", scale)
        self.begin.replace("found_inf_ptr", inf)
        launches = (self.begin, *self.steps)
        if capturing and not all(launch.loaded for launch in launches):
            raise RuntimeError(
                "a CUDA graph cannot capture a step whose kernels are not loaded; make a step like"
                " it first"
            )
        for launch in launches:
            launch.fire()

    def _begin(self) -> Launch:
        n = len(self.plan.fields)
        prepare = -(-n // PREPARE_BLOCK)
        args = (
            self.fields,
            self.tables.addresses,
            self.tables.values,
            self.tables.pointers,
            self.constants,
            self.parts,
            self.partials,
            self.no_scale,
            self.no_inf,
            n,
            prepare,
        )
        constants = begin_constants(self.plan, self.rule, self.dtype)
        return Launch(begin, prepare + len(self.parts), args, constants, BEGIN_WARPS)
