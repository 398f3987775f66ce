"""The one tolerance table: what arithmetic an implementation may use, and why.

There are no relative or absolute figures. The oracle carries a bound on the error of each value
beside it, from the roundings that an entry grants; a test allows ``margin`` times that bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Where roundings happen.

    ``rule``: each operation of an update rule. ``stored``: the clipped gradient and each result.
    ``scalars``: each operation among hyperparameters alone, such as ``1 - beta2**step``. Norms and
    clip factors are fp32, fp64 where ``stored`` is, as the definition says.
    """

    rule: torch.dtype
    stored: torch.dtype
    scalars: torch.dtype
    margin: float
    reason: str

    @property
    def norms(self) -> torch.dtype:
        """What unit norms and clip factors are computed in."""
        return torch.float64 if self.stored is torch.float64 else torch.float32


f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

TOLERANCES = {
    "float64": Tolerance(f64, f64, f64, 2.0, "the oracle rounds to fp64 as often as the code does"),
    "float32": Tolerance(f32, f32, f64, 1.0, "fp32 throughout; hyperparameters are host doubles"),
    "float64, scalars on the device": Tolerance(
        f64, f64, f32, 1.0, "step counts, and lr or betas given as Tensor, are fp32"
    ),
    "float32, scalars on the device": Tolerance(
        f32, f32, f32, 1.0, "step counts, and lr or betas given as Tensor, are fp32"
    ),
    "bfloat16": Tolerance(
        f32, bf16, f64, 1.0, "upcast once, fp32 rule, one rounding back; clipped gradient rounded"
    ),
    "float16": Tolerance(
        f32, f16, f64, 1.0, "upcast once, fp32 rule, one rounding back; clipped gradient rounded"
    ),
    "bfloat16, operation by operation": Tolerance(
        bf16, bf16, f64, 1.0, "torch's for-loop and foreach round each operation to storage"
    ),
    "float16, operation by operation": Tolerance(
        f16, f16, f64, 1.0, "torch's for-loop and foreach round each operation to storage"
    ),
    "float64, Triton": Tolerance(
        f64, f64, f64, 4.0, "as float64; beta**step is exp2(step * log2(beta)), 3 roundings"
    ),
    "float32, Triton": Tolerance(
        f32, f32, f64, 4.0, "div.full.f32 is off by 2 ulp, 4 times as much as a rounding (PTX ISA)"
    ),
    "float32, Triton interpreted": Tolerance(
        f32, f32, f64, 1.5, "a moment as a lerp takes 3 roundings, and 2 as in the formula"
    ),
    "float16, Triton": Tolerance(
        f32, f16, f64, 1.0, "fp32 as in its own entry, a single rounding when a result is stored"
    ),
    "bfloat16, Triton": Tolerance(
        f32, bf16, f64, 1.0, "fp32 as in its own entry, a single rounding when a result is stored"
    ),
    "bfloat16, Triton interpreted": Tolerance(
        f32, bf16, f64, 2.0, "the interpreter's stores cut bits off: a whole spacing, not half"
    ),
}
