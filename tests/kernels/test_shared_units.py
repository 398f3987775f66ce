"""Units that ranks share, in the kernels: on the first of two ranks, to whose sums none are added.

So they come out as units of what lies here alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agc_triton.triton_path import buckets
from tests.support.optimizers import CLIPPING, build, stateful
from tests.support.places import DEVICE
from tests.support.plans import plan_of
from tests.support.ranks import shared
from tests.support.tensors import grad_like, same, weight

# Of the whole, each sharded along its last dimension: a unit in rows, in registers, split, alone.
SHAPES = [(3, 10), (5, 700), (1, 41_000), (1, 90), (2, 3, 8)]
SPANS = {"one part": buckets.ACROSS_SPAN, "several parts": 64}
CASES = [
    ("SGD", "skip_unit", "one part"),
    ("SGD", "skip_unit", "several parts"),
    ("AdamW", "propagate", "several parts"),
]


@pytest.mark.parametrize(("name", "nonfinite", "parts"), CASES)
def test_step_as_units_of_what_lies_here(
    name: str, nonfinite: str, parts: str, two_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "ACROSS_SPAN", SPANS[parts])
    monkeypatch.setattr(buckets, "SPLIT_CHUNKS", {2: 1, 4: 1, 8: 1})  # a tile, and spans, are short
    options = {**stateful(name), "clipping": CLIPPING, "nonfinite": nonfinite}
    whole = [weight(shape, device=DEVICE, seed=i) for i, shape in enumerate(SHAPES)]
    params = shared(two_ranks, whole)
    here = [p.to_local().clone() for p in params]
    both = [build(name, tensors, {**options, "backend": "triton"}) for tensors in (params, here)]
    for step in range(2):
        grads = [grad_like(w, 10 * step + i) for i, w in enumerate(whole)]
        if nonfinite == "skip_unit":
            grads[1][2, 5] = grads[2][0, 0] = torch.nan
        for param, plain, grad in zip(params, here, shared(two_ranks, grads), strict=True):
            param.grad, plain.grad = grad, grad.to_local()
        for optimizer in both:
            optimizer.step()
    found = [p.to_local() for p in params]
    torch.testing.assert_close(found, here, rtol=2e-6, atol=2e-6)
    skipped = [optimizer.skipped_units for optimizer in both]  # type: ignore[attr-defined]
    assert skipped == ([4, 4] if nonfinite == "skip_unit" else [0, 0])
    (part,) = plan_of(both[0]).parts
    assert bool(part.launches.launcher.folding) == (parts == "several parts")
    assert {bucket.shape.across for bucket in part.launches.plan.buckets} == {True}
    assert not same(found, [w[..., : p.shape[-1]] for w, p in zip(whole, found, strict=True)])
