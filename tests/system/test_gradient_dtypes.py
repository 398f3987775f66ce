"""Gradients of another dtype than their parameters (``grad_dtype``), on both paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, RMSprop

from agc_triton import AGC, SGD_AGC, adaptive_clip_grad_
from tests.support.checks import check_clipped, oracle_for, states_of, step_and_check
from tests.support.optimizers import (
    CLIPPING,
    EACH_RULE,
    EACH_WAY,
    TRITON,
    WAY_CASES,
    build,
    stateful,
)
from tests.support.places import CPU, KERNELS, Place
from tests.support.plans import plan_of
from tests.support.soak import soaked
from tests.support.tensors import TILE_SHAPES, assign, grads_like, same

pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="before torch 2.10 there is no grad_dtype"
)

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# Of the parameter and of its gradient: wider, narrower, and as wide.
PAIRS = [(f32, bf16), (f32, f64), (bf16, f32)]
pairs = pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS, ids=str)


def leaves(
    place: Place,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]] = TILE_SHAPES[:2],
) -> list[Tensor]:
    """Weights whose gradients may have another dtype."""
    found = place.weights(shapes, dtype)
    for param in found:
        param.requires_grad_().grad_dtype = grad_dtype
    return found


def grads_of(params: Sequence[Tensor], seed: int, grad_dtype: torch.dtype) -> list[Tensor]:
    return [grad.to(grad_dtype) for grad in grads_like(params, seed)]


def check(
    name: str, place: Place, dtype: torch.dtype, grad_dtype: torch.dtype, mode: str = "default"
) -> None:
    """Two steps beside the oracle, each from the same values."""
    # What is in registers and in parts, with one of them.
    params = leaves(place, dtype, grad_dtype, TILE_SHAPES if name == "SGD" else TILE_SHAPES[:2])
    options = {**stateful(name, dtype), "clipping": CLIPPING}
    optimizer = build(name, params, {**options, "backend": place.backend}, mode)
    # Gradients that a copy would round go whole through torch's own functions.
    whole = place == CPU and torch.promote_types(dtype, grad_dtype) != dtype
    rounds_as = "not fused" if mode == "default" and whole else mode
    oracle = oracle_for(name, params, place, rounds_as, **options)
    for seed in range(2):
        oracle.load(params, states_of(optimizer, params))
        step_and_check(optimizer, oracle, params, grads_of(params, seed, grad_dtype))


@pytest.mark.parametrize(
    ("name", "dtype", "grad_dtype"),
    soaked(
        [(name, *pair) for name in EACH_RULE for pair in PAIRS],
        lambda name, dtype, grad_dtype: name in ("SGD", "AdamW") or grad_dtype is bf16,
    ),
    ids=str,
)
def test_follows_the_oracle(
    name: str, dtype: torch.dtype, grad_dtype: torch.dtype, place: Place
) -> None:
    check(name, place, dtype, grad_dtype)


@pytest.mark.parametrize(("name", "mode"), WAY_CASES)
def test_follows_the_oracle_in_every_mode(name: str, mode: str) -> None:
    if mode != "differentiable":  # its parameters are no leaves
        check(name, CPU, f32, bf16, mode)


@pytest.mark.parametrize("name", soaked(EACH_RULE, lambda name: name in EACH_WAY))
def test_unclipped_steps_are_those_on_converted_gradients(name: str, place: Place) -> None:
    ours, theirs = leaves(place, f32, bf16), leaves(place, f32, f32)
    options = {**stateful(name), "clipping": 0, "backend": place.backend}
    optimizer, expected = build(name, ours, options), build(name, theirs, options)
    for seed in range(2):
        grads = grads_of(ours, seed, bf16)
        assign(ours, grads)
        assign(theirs, [grad.float() for grad in grads])
        optimizer.step()
        expected.step()
    assert same(ours, theirs)


def test_a_plan_sees_that_gradients_have_another_dtype(place: Place) -> None:
    params = leaves(place, f32, bf16)
    options = {**stateful("SGD"), "clipping": CLIPPING}
    optimizer = build("SGD", params, {**options, "backend": place.backend})
    oracle = oracle_for("SGD", params, place, **options)
    for seed, dtype in enumerate((f32, bf16, bf16, f32, f64)):
        for param in params:
            param.grad = None
            param.grad_dtype = dtype
        step_and_check(optimizer, oracle, params, grads_of(params, seed, dtype))


def test_each_dtype_of_gradients_has_launches_of_its_own() -> None:
    params = leaves(KERNELS, f32, bf16)[:2] + leaves(KERNELS, f32, f32)[:1]
    assign(params, grads_of(params[:2], 0, bf16) + grads_like(params[2:], 0))
    optimizer: Any = SGD_AGC(params, **TRITON)
    table = optimizer.explain()
    optimizer.step()
    assert [len(part.entries) for part in plan_of(optimizer).parts] == [2, 1]
    assert (table["class"] == "begin").sum() == 2
    sizes = [p.numel() * (4 + itemsize + 4) for p, itemsize in zip(params, (2, 2, 4), strict=True)]
    assert table["bytes"].iloc[-1] == sum(sizes)


@pairs
def test_gradients_alone_are_clipped_in_their_own_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, place: Place
) -> None:
    params = leaves(place, dtype, grad_dtype)
    before = grads_of(params, 0, grad_dtype)
    assign(params, [grad.clone() for grad in before])
    adaptive_clip_grad_(params, clipping=CLIPPING, backend=place.backend)
    for param, grad in zip(params, before, strict=True):
        assert param.grad is not None
        assert param.grad.dtype == grad_dtype
        check_clipped(param.detach(), grad, param.grad, place)


@pytest.mark.parametrize("cls", [SGD, RMSprop])
def test_the_wrapper_clips_what_its_base_takes(cls: Any) -> None:
    ours, theirs = leaves(CPU, f32, bf16), leaves(CPU, f32, bf16)
    wrapped, base = AGC(cls(ours), clipping=CLIPPING), cls(theirs)
    for seed in range(2):
        assign(ours, grads_of(ours, seed, bf16))
        assign(theirs, grads_of(theirs, seed, bf16))
        adaptive_clip_grad_(theirs, clipping=CLIPPING)
        wrapped.step()
        base.step()
    assert same(ours, theirs)


def test_what_the_base_does_not_take_is_its_own_affair() -> None:
    params = leaves(CPU, f32, bf16)
    assign(params, grads_of(params, 0, bf16))
    with pytest.raises(RuntimeError, match="dtype"):
        AGC(Adam(params), clipping=CLIPPING).step()


@pytest.mark.parametrize("name", soaked(EACH_RULE, lambda name: name in EACH_WAY))
def test_scaled_gradients_are_unscaled_before_they_are_rounded(name: str, place: Place) -> None:
    scale = 2.0**16
    ours, theirs = leaves(place, f16, f32), leaves(place, f16, f32)
    options = {**stateful(name, f16), "clipping": CLIPPING, "backend": place.backend}
    optimizer, expected = build(name, ours, options), build(name, theirs, options)
    grads = grads_of(ours, 0, f32)
    assign(ours, [grad * scale for grad in grads])
    assign(theirs, grads)
    device = ours[0].device
    optimizer.grad_scale = torch.tensor(scale, device=device)  # type: ignore[attr-defined]  # GradScaler's
    optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]  # likewise
    optimizer.step()
    expected.step()
    assert same(ours, theirs)
