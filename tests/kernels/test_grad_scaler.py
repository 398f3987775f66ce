"""Loss scaling on the Triton path: unscaling, found_inf and step counts inside the kernels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checks import oracle_for, states_of, step_with
from tests.support.optimizers import EACH_WAY, STATEFUL, TRITON, build, stateful
from tests.support.places import DEVICE, KERNELS
from tests.support.soak import soaked
from tests.support.tensors import TILE_SHAPES, assign, grads_like, same, weights

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

SHAPES = TILE_SHAPES[:2]
LONG = (*SHAPES, TILE_SHAPES[3])  # with a unit that is summed in parts
SCALE = 2.0**12  # a power of two scales exactly
every_rule = pytest.mark.parametrize("name", EACH_WAY)


def step_scaled(
    optimizer: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: Tensor | None,
    found_inf: float,
) -> None:
    """What torch.amp.GradScaler does with an optimizer that takes scaled gradients."""
    assign(params, [grad if scale is None else grad * scale.item() for grad in grads])
    before = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.grad_scale = scale
    optimizer.found_inf = torch.full((), found_inf, device=DEVICE)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert same([p.grad for p in params], before)


@pytest.mark.parametrize(
    ("name", "shape"),
    soaked(
        itertools.product(EACH_WAY, (None, (), (1,))),
        lambda name, shape: shape == () or name == "AdamW",
    ),
    ids=str,
)
def test_unscales_before_it_clips(name: str, shape: tuple[int, ...] | None) -> None:
    options = {**STATEFUL[name], **TRITON}
    shapes = LONG if name == "SGD" else SHAPES
    params = weights(shapes, device=DEVICE)
    optimizer = build(name, params, options)
    oracle = oracle_for(name, params, KERNELS, **options)
    for seed in range(2):
        # None: GradScaler.unscale_ has been called before. A scaler may come with another tensor.
        scale = None if shape is None else torch.full(shape, SCALE * 2**seed, device=DEVICE)
        grads = grads_like(params, seed)
        oracle.step(grads)
        step_scaled(optimizer, params, grads, scale, 0.0)
        oracle.check(params, states_of(optimizer, params))


@every_rule
def test_norms_of_scaled_half_precision_gradients_do_not_overflow(name: str) -> None:
    options = {**stateful(name, torch.float16), **TRITON}
    params = weights(SHAPES, torch.float16, DEVICE)
    optimizer = build(name, params, options)
    oracle = oracle_for(name, params, KERNELS, **options)
    grads = grads_like(params, 0)
    oracle.step(grads)
    # Their squares are out of fp16's range.
    step_scaled(optimizer, params, grads, torch.tensor(128.0, device=DEVICE), 0.0)
    oracle.check(params, states_of(optimizer, params))


@pytest.mark.parametrize("before", [0, 1])
@every_rule
def test_nothing_moves_where_inf_was_found(name: str, before: int) -> None:
    options = {**STATEFUL[name], **TRITON}
    params = weights(SHAPES, device=DEVICE)
    optimizer = build(name, params, options)
    scale = torch.tensor(SCALE, device=DEVICE)
    oracle = oracle_for(name, params, KERNELS, **options)
    for seed in range(before):
        grads = grads_like(params, seed)
        oracle.step(grads)
        step_scaled(optimizer, params, grads, scale, 0.0)
    kept = copy.deepcopy((params, states_of(optimizer, params)))
    step_scaled(optimizer, params, [g * torch.inf for g in grads_like(params, 5)], scale, 1.0)
    if before:
        assert same((params, states_of(optimizer, params)), kept)
    else:  # as torch.optim's fused=True leaves it: created, all zeros but what starts as a factor
        assert same(params, kept[0])
        for state in states_of(optimizer, params):
            off = {key: x - float(key == "mu_product") for key, x in state.items()}
            assert not any(bool(x.any()) for x in off.values())
    # The next step is the one that was skipped: the first, if none has been taken.
    grads = grads_like(params, before)
    oracle.step(grads)
    step_scaled(optimizer, params, grads, scale, 0.0)
    oracle.check(params, states_of(optimizer, params))


def test_steps_after_scaled_ones_are_neither_scaled_nor_skipped() -> None:
    params = weights(LONG, device=DEVICE)
    options = {**STATEFUL["SGD"], **TRITON}
    optimizer = build("SGD", params, options)
    oracle = oracle_for("SGD", params, KERNELS, **options)
    step_scaled(optimizer, params, grads_like(params, 5), torch.tensor(SCALE, device=DEVICE), 1.0)
    grads = grads_like(params, 0)
    oracle.step(grads)
    step_with(optimizer, params, grads)
    oracle.check(params, states_of(optimizer, params))


def test_a_skipped_first_step_keeps_momentum_undamped() -> None:
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "dampening": 0.4, **TRITON}
    params = weights(SHAPES, device=DEVICE)
    optimizer, oracle = build("SGD", params, options), oracle_for("SGD", params, KERNELS, **options)
    scale = torch.tensor(SCALE, device=DEVICE)
    step_scaled(optimizer, params, grads_like(params, 5), scale, 1.0)
    for seed in range(2):
        grads = grads_like(params, seed)
        oracle.step(grads)
        step_scaled(optimizer, params, grads, scale, 0.0)
        oracle.check(params, states_of(optimizer, params))


def test_a_late_first_gradient_after_a_skipped_step() -> None:
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "dampening": 0.4, **TRITON}
    params = weights(SHAPES, device=DEVICE)
    optimizer, oracle = build("SGD", params, options), oracle_for("SGD", params, KERNELS, **options)
    scale = torch.tensor(SCALE, device=DEVICE)
    step_scaled(optimizer, params[:2], grads_like(params[:2], 5), scale, 1.0)
    for seed in range(2):
        grads = grads_like(params, seed)
        oracle.step(grads)
        step_scaled(optimizer, params, grads, scale, 0.0)
        oracle.check(params, states_of(optimizer, params))


def test_groups_that_are_not_clipped_are_unscaled_and_skipped_too() -> None:
    params = weights(SHAPES, device=DEVICE)
    options = {**STATEFUL["AdamW"], **TRITON, "clipping": 0}
    optimizer = build("AdamW", params, options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    scale = torch.tensor(SCALE, device=DEVICE)
    for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
        grads = grads_like(params, seed)
        if not found_inf:
            oracle.step(grads)
        step_scaled(optimizer, params, grads, scale, found_inf)
        oracle.check(params, states_of(optimizer, params))


def test_parameters_on_the_torch_path_are_scaled_and_skipped_alike() -> None:
    params = weights(SHAPES, device=DEVICE)
    empty = torch.zeros(0, 3, device=DEVICE)
    options = {**STATEFUL["AdamW"], **TRITON}
    optimizer = build("AdamW", [*params, empty], options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    scale = torch.tensor(SCALE, device=DEVICE)
    for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
        grads = grads_like(params, seed)
        if not found_inf:
            oracle.step(grads)
        step_scaled(optimizer, [*params, empty], [*grads, empty.clone()], scale, found_inf)
        oracle.check(params, states_of(optimizer, params))
    assert float(optimizer.state[empty]["step"]) == 2.0


@pytest.mark.parametrize("unscale_first", [False, True])
@every_rule
def test_grad_scaler(name: str, unscale_first: bool) -> None:
    options = {**STATEFUL[name], **TRITON}
    params = weights(SHAPES, device=DEVICE)
    optimizer: Any = build(name, params, options)
    assert optimizer._step_supports_amp_scaling
    oracle = oracle_for(name, params, KERNELS, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE, growth_interval=1)
    scales = []
    for seed in range(3):
        grads = grads_like(params, seed)
        scale = scaler.scale(torch.ones((), device=DEVICE)).item()
        scales.append(scale / SCALE)
        assign(params, [grad * scale for grad in grads])
        if seed == 1:
            assert params[1].grad is not None
            params[1].grad[3] = torch.inf
        else:
            oracle.step(grads)
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        oracle.check(params, states_of(optimizer, params))
    assert scales == [1.0, 2.0, 1.0]
    assert not hasattr(optimizer, "found_inf")
