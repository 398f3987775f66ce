"""Properties of the clipped gradient, whatever the shapes and numbers.

The momentum buffer of SGD starts as its first gradient: after one step it is the clipped gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agc_triton import adaptive_clip_grad_
from tests.support.optimizers import MODES, build
from tests.support.oracle import clip
from tests.support.rounded import as_float64, exact
from tests.support.tolerances import TOLERANCES

EXACT_SCALES = (torch.float32, torch.float64, torch.bfloat16)  # the range of fp16 is too narrow
DTYPES = (*EXACT_SCALES, torch.float16)
# Multiples of 1/64 up to 4: each dtype holds them, and no norm of them is tiny without being 0.
NUMBERS = st.sampled_from([n / 64 for n in (0, 1, -1, 2, 3, -5, 16, -64, 100, 192, -256)])


class Problem(NamedTuple):
    """What is clipped, and how."""

    weight: Tensor
    grad: Tensor
    agc: dict[str, Any]

    def units(self, tensor: Tensor) -> Sequence[Tensor]:
        """The units of a tensor of the weight's shape."""
        if sum(size != 1 for size in tensor.shape) <= 1:
            return (tensor,)
        return tensor.unbind(self.agc["unit_dim"] or 0)

    def limits(self) -> list[float]:
        """Of each unit."""
        norms = [float(torch.linalg.vector_norm(w.double())) for w in self.units(self.weight)]
        return [self.agc["clipping"] * max(norm, self.agc["agc_eps"]) for norm in norms]


@st.composite
def problems(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> Problem:
    shape, dtype = (
        draw(hnp.array_shapes(min_dims=0, max_dims=5, max_side=4)),
        draw(st.sampled_from(dtypes)),
    )
    arrays = hnp.arrays(np.float64, shape, elements=NUMBERS)
    unit_dims = st.none() | st.integers(-len(shape), len(shape) - 1) if shape else st.none()
    agc = {
        "clipping": draw(st.floats(2**-10, 2)),
        "agc_eps": draw(st.floats(2**-10, 2)),
        "unit_dim": draw(unit_dims),
    }
    return Problem(torch.tensor(draw(arrays)).to(dtype), torch.tensor(draw(arrays)).to(dtype), agc)


def clipped(problem: Problem, mode: str = "default", **options: Any) -> Tensor:
    param = problem.weight.clone()
    param.grad = problem.grad.clone()
    optimizer = build("SGD", [param], {"momentum": 0.9, **problem.agc, **options}, mode)
    optimizer.step()
    buffer: Tensor = optimizer.state[param]["momentum_buffer"]
    return buffer


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("mode", MODES)
@given(problem=problems())
def test_up_to_the_limit_no_bit_changes_and_over_it_the_norm_is_the_limit(
    mode: str, problem: Problem
) -> None:
    key = str(problem.grad.dtype).removeprefix("torch.")
    norms = TOLERANCES[key].norms
    weight, grad = (exact(as_float64(t), norms) for t in (problem.weight, problem.grad))
    expected = clip(weight, grad, problem.grad.shape, problem.agc, problem.grad.dtype)
    errors = torch.tensor(np.broadcast_to(expected.error, grad.value.shape))
    out = clipped(problem, mode)
    pairs = zip(*map(problem.units, (out, problem.grad, errors)), problem.limits(), strict=True)
    for after, before, error, limit in pairs:
        if not error.any():  # under the limit by more than the norm's rounding
            assert torch.linalg.vector_norm(before.double()) <= limit
            assert bits_equal(after, before)
        elif torch.linalg.vector_norm(before.double()) > limit:
            off = abs(torch.linalg.vector_norm(after.double()) - limit)
            assert off <= TOLERANCES[key].margin * torch.linalg.vector_norm(error)


@given(problem=problems())
def test_at_the_limit_no_bit_changes(problem: Problem) -> None:
    problem.agc.update(clipping=2.0**-3, agc_eps=2.0**-10)
    at_limit = problem._replace(grad=problem.weight * 2**-3)
    assert bits_equal(clipped(at_limit), at_limit.grad)


@given(problem=problems())
def test_a_unit_is_scaled_by_one_factor_of_at_most_one(problem: Problem) -> None:
    for after, before in zip(*map(problem.units, (clipped(problem), problem.grad)), strict=True):
        assert (after.abs() <= before.abs()).all()
        assert ((after == 0) | (after.sign() == before.sign())).all()
        # Rounding keeps the order of products with the same factor.
        order = before.abs().flatten().argsort()
        assert (after.abs().flatten()[order].diff() >= 0).all()


@given(problem=problems(EXACT_SCALES), exponent=st.integers(-8, 8))
def test_scaling_weights_and_gradients_scales_the_result(problem: Problem, exponent: int) -> None:
    scale = 2.0**exponent
    agc = {**problem.agc, "agc_eps": problem.agc["agc_eps"] * scale}
    scaled = Problem(problem.weight * scale, problem.grad * scale, agc)
    assert bits_equal(clipped(scaled), clipped(problem) * scale)


@given(problem=problems(EXACT_SCALES), exponent=st.integers(1, 8))
def test_over_the_limit_the_scale_of_the_gradient_does_not_matter(
    problem: Problem, exponent: int
) -> None:
    larger = problem._replace(grad=problem.grad * 2.0**exponent)
    units = map(problem.units, (clipped(larger), clipped(problem), problem.grad))
    for after, expected, before in zip(*units, strict=True):
        if not torch.equal(expected, before):
            assert bits_equal(after, expected)


@given(problem=problems(), factor=st.floats(1, 4))
def test_a_larger_clipping_never_clips_more(problem: Problem, factor: float) -> None:
    agc = {**problem.agc, "clipping": problem.agc["clipping"] * factor}
    assert (clipped(problem._replace(agc=agc)).abs() >= clipped(problem).abs()).all()


@given(problem=problems(), data=st.data())
def test_units_do_not_see_each_other(problem: Problem, data: st.DataObject) -> None:
    count = len(problem.units(problem.weight))
    changed = data.draw(st.integers(0, count - 1))
    other = problem._replace(weight=problem.weight.clone(), grad=problem.grad.clone())
    other.units(other.weight)[changed].mul_(-3)
    other.units(other.grad)[changed].fill_(data.draw(st.sampled_from([torch.nan, torch.inf, 4.0])))
    units = map(problem.units, (clipped(other), clipped(problem)))
    for i, (after, expected) in enumerate(zip(*units, strict=True)):
        assert i == changed or bits_equal(after, expected)


@given(problem=problems())
def test_maximize_flips_the_sign_only(problem: Problem) -> None:
    assert bits_equal(clipped(problem, maximize=True), -clipped(problem))


@given(problem=problems())
def test_the_functional_form_clips_alike(problem: Problem) -> None:
    param = problem.weight.clone()
    param.grad = problem.grad.clone()
    adaptive_clip_grad_(param, **problem.agc)
    assert bits_equal(param.grad, clipped(problem))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "default"])
@given(problem=problems())
def test_modes_clip_alike(mode: str, problem: Problem) -> None:
    assert bits_equal(clipped(problem, mode), clipped(problem))
