"""Units that ranks share, on the torch path: the first of two, to whose sums none are added.

So they come out as units of what lies here alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.optimizers import CLIPPING, EACH_WAY, build, stateful
from tests.support.places import DEVICE
from tests.support.ranks import shared
from tests.support.soak import soaked
from tests.support.tensors import grad_like, weight

# Each sharded along its last dimension; the last has nothing beyond the first rank.
SHAPES = [(3, 10), (5, 70), (2, 3, 8), (9,), (4, 1)]
f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64


DTYPES = [(f32, [f32]), (f64, [f64]), (bf16, [bf16]), (bf16, [f32, bf16]), (f32, [bf16, f32])]
CASES = [
    (name, nonfinite, dtype, grad_dtypes)
    for name in EACH_WAY
    for nonfinite in ("propagate", "skip_unit")
    for dtype, grad_dtypes in DTYPES
    # Before torch 2.10 a gradient can have no other dtype.
    if grad_dtypes == [dtype] or hasattr(torch.Tensor, "grad_dtype")
]


@pytest.mark.parametrize(
    ("name", "nonfinite", "dtype", "grad_dtypes"),
    soaked(
        CASES,
        lambda name, nonfinite, dtype, grad_dtypes: (
            name == "AdamW" if nonfinite == "skip_unit" else name == "SGD" or dtype is f32
        ),
    ),
    ids=str,
)
def test_step_as_units_of_what_lies_here(
    name: str,
    nonfinite: str,
    dtype: torch.dtype,
    grad_dtypes: list[torch.dtype],
    two_ranks: Any,
) -> None:
    options = {**stateful(name, dtype), "clipping": CLIPPING, "nonfinite": nonfinite}
    options |= {"backend": "torch", "foreach": False}
    whole = [weight(shape, dtype, device=DEVICE, seed=i) for i, shape in enumerate(SHAPES)]
    params = shared(two_ranks, whole)
    here = [p.to_local().clone() for p in params]
    for i, param in enumerate([*params, *here]):
        if hasattr(param, "grad_dtype"):
            param.requires_grad_().grad_dtype = grad_dtypes[i % len(SHAPES) % len(grad_dtypes)]
    both = [build(name, tensors, options) for tensors in (params, here)]
    for step in range(2):
        grads = [grad_like(w, 10 * step + i) for i, w in enumerate(whole)]
        grads = [g.to(grad_dtypes[i % len(grad_dtypes)]) for i, g in enumerate(grads)]
        if nonfinite == "skip_unit":
            grads[1][2, 5] = torch.nan
        for param, plain, grad in zip(params, here, shared(two_ranks, grads), strict=True):
            param.grad, plain.grad = grad, grad.to_local()
        for optimizer in both:
            optimizer.step()
    found = [p.to_local() for p in params]
    assert {p.dtype for p in found} == {dtype}
    # Sums in another order; where bf16 rounds to the other side, a spacing.
    rtol = torch.finfo(bf16).eps if dtype == bf16 else 2e-6
    torch.testing.assert_close(found, here, rtol=rtol, atol=2e-6)
