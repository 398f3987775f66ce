"""Numbers at the ends of their range: denormals, 1e30, zeros, ties, squares that overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agc_triton import adaptive_clip_grad_
from agc_triton.norms import norm_dtype
from tests.support.checks import check_clipped, oracle_for, states_of, step_and_check, step_with
from tests.support.optimizers import CLIPPING, EACH_WAY, Kwargs, build
from tests.support.oracle import assert_within
from tests.support.places import DEVICE, KERNELS, Place
from tests.support.plans import tile_shapes
from tests.support.rounded import Rounded
from tests.support.tensors import grad_like, same

# numpy, which the interpreter computes with, warns of squares that overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

every_name = pytest.mark.parametrize("name", EACH_WAY)

OPTIONS: dict[str, Kwargs] = {
    "SGD": {"lr": 0.5, "momentum": 0.9},
    "Adam": {"lr": 0.5, "amsgrad": True},
    "AdamW": {"lr": 0.5, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.5, "momentum": 0.9},
    "NAdam": {"lr": 0.5, "weight_decay": 0.1},
    "Adagrad": {"lr": 1.0, "lr_decay": 0.1},  # it multiplies denormals first
}
LEAST_SCALE, LARGEST_SCALE = -44, 30  # even powers of ten; fp32's denormals end at the least


def grid(dtype: torch.dtype, least: int) -> tuple[Tensor, Tensor]:
    """Units with each scale of weights beside each scale of gradients, none near its limit."""
    scales = 10.0 ** np.arange(least, LARGEST_SCALE + 1, 2)
    p, g = np.meshgrid(scales, scales)
    weight = torch.from_numpy(p).reshape(-1, 1) * torch.tensor([1.0, -1.0, 0.5, 1.0])
    grad = torch.from_numpy(g).reshape(-1, 1) * torch.tensor([0.5, -1.5, 1.0, 0.25])
    return weight.to(dtype), grad.to(dtype)


def overflows(tensor: Tensor) -> Tensor:
    """Whether each unit's sum of squares does, in the dtype of norms."""
    return tensor.to(norm_dtype(tensor.dtype)).square().sum(1).isinf()


# The interpreter mistakes denormals of bf16, which squares of gradients are.
SCALED = [
    # NAdam multiplies them with numbers that no option makes exact.
    *((n, dtype) for n in EACH_WAY if n != "NAdam" for dtype in (torch.float32, torch.float64)),
    ("SGD", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), SCALED, ids=str)
def test_weights_and_gradients_of_any_scale(name: str, place: Place, dtype: torch.dtype) -> None:
    """A norm that overflows in two passes is inf, and no other is.

    An infinite limit clips nothing, an infinite gradient norm makes the gradient 0.
    """
    weight, grad = grid(dtype, -30 if dtype is torch.bfloat16 else LEAST_SCALE)
    of_weight, of_grad = overflows(weight), overflows(grad)
    over = of_weight | of_grad
    assert bool(over.any()) is (dtype is not torch.float64)
    unlimited = torch.where((of_grad & ~of_weight)[:, None], 0.0, grad)

    results = []
    for clipping, given in ((CLIPPING, grad), (torch.inf, unlimited)):
        param = weight.clone().to(place.device)
        options = {**OPTIONS[name], "clipping": clipping, "backend": place.backend}
        optimizer = build(name, [param], options)
        step_with(optimizer, [param], [given.to(place.device)])
        results.append({"param": param.cpu()})
        moments = states_of(optimizer, [param])[0]
        results[-1].update({k: x.cpu() for k, x in moments.items() if k != "step"})

    oracle = oracle_for(name, [weight], place, **OPTIONS[name], clipping=CLIPPING)
    oracle.step([grad])
    expected = {**oracle.states[0], "param": oracle.params[0]}
    rows = (~over).numpy()
    for key, actual in results[0].items():
        error = np.broadcast_to(expected[key].error, expected[key].value.shape)
        within = Rounded(expected[key].value[rows], error[rows], expected[key].dtype)
        assert_within(actual[~over], within, oracle.tolerance.margin, key)
        assert same(actual[over], results[1][key][over]), key
    assert bool(results[0]["param"].isfinite().all())


@pytest.mark.parametrize("shape", [(3, 20), (5,), (3, 1, 1), ()], ids=str)
@every_name
def test_zero_weights_train(name: str, shape: tuple[int, ...]) -> None:
    # tests/torch_path/test_layouts.py shows it of the torch path.
    param = torch.zeros(shape, device=DEVICE)
    options = {**OPTIONS[name], "clipping": CLIPPING, "backend": "triton"}
    optimizer, oracle = build(name, [param], options), oracle_for(name, [param], KERNELS, **options)
    for seed in range(2):
        step_and_check(optimizer, oracle, [param], [grad_like(param, seed)])
    assert bool((param != 0).all())


@every_name
def test_zero_gradients_move_nothing(name: str, place: Place) -> None:
    params = [place.weight((3, 20)), torch.zeros(4, device=place.device)]
    before = [p.clone() for p in params]
    options = {**OPTIONS[name], "weight_decay": 0.0, "backend": place.backend}
    optimizer: Any = build(name, params, options)
    for _ in range(2):
        step_with(optimizer, params, [torch.zeros_like(p) for p in params])
    assert same(params, before)
    for state in states_of(optimizer, params):
        scalars = optimizer.rule.kernel.scalars
        assert not any(x.any() for key, x in state.items() if key not in scalars)


def test_where_a_weight_is_nan_its_units_gradient_is_not_clipped(place: Place) -> None:
    param = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]], device=place.device)
    param.grad = torch.ones_like(param)
    adaptive_clip_grad_([param], clipping=CLIPPING, backend=place.backend)
    assert param.grad[0].tolist() == [1.0, 1.0]
    assert bool((param.grad[1] < 1.0).all())


# In rows, in registers, in parts, strided, and one unit.
TIES: dict[str, tuple[tuple[int, ...], int]] = {
    "rows": ((3, 20), 0),
    "registers": ((2, 700), 0),
    "split": ((1, 20_484), 0),
    "strided": ((3, 2, 4), 1),
    "one unit": ((21,), 0),
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("kind", TIES)
def test_exactly_at_the_limit_no_bit_changes(place: Place, kind: str, dtype: torch.dtype) -> None:
    shape, unit_dim = TIES[kind]
    param = place.weight(shape, dtype, unit_dim=unit_dim)
    grad = param / 4  # exactly, and so is its norm
    param.grad = grad.clone()
    adaptive_clip_grad_([param], clipping=0.25, unit_dim=unit_dim, backend=place.backend)
    assert torch.equal(param.grad, grad)
    clipping = 0.25 * (1 - 2**-6)
    adaptive_clip_grad_([param], clipping=clipping, unit_dim=unit_dim, backend=place.backend)
    assert bool((param.grad != grad).all())


def test_the_next_number_over_the_limit_is_clipped(place: Place) -> None:
    param = torch.full((1,), 4.0, device=place.device)
    param.grad = torch.nextafter(param / 4, param)
    adaptive_clip_grad_([param], clipping=0.25, backend=place.backend)
    assert torch.equal(param.grad, param / 4)


def huge_first(values: Tensor) -> None:
    values.view(-1)[0] = 1e18


def huge_last(values: Tensor) -> None:
    values.view(-1)[-1] = -1e18


def just_finite(values: Tensor) -> None:
    """Squares that add up to about 0.6 of the largest number."""
    values.fill_((2e38 / values[0].numel()) ** 0.5)


@pytest.mark.parametrize("role", ["grad", "param", "both"])
@pytest.mark.parametrize("spoil", [huge_first, huge_last, just_finite])
@pytest.mark.parametrize("shape", [(3, 20), (2, 700), (2, 20_484)], ids=str)
def test_huge_elements_among_small_ones(
    place: Place, shape: tuple[int, ...], spoil: Callable[[Tensor], None], role: str
) -> None:
    param = place.weight(shape)
    grad = grad_like(param)
    for tensor in {"grad": (grad,), "param": (param,), "both": (param, grad)}[role]:
        spoil(tensor)
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "clipping": CLIPPING}
    optimizer = build("SGD", [param], {**options, "backend": place.backend})
    oracle = oracle_for("SGD", [param], place, **options)
    step_and_check(optimizer, oracle, [param], [grad])
    if place.backend == "triton":
        assert any(shape.split for shape in tile_shapes(optimizer)) is (len(grad[0]) > 20_480)


# Squares that overflow fp16, that are 0 there, and the smallest numbers there are.
@pytest.mark.parametrize("scale", [300.0, 6e4, 1e-4, 2.0**-24])
@pytest.mark.parametrize("shape", [(4, 24), (2, 700), (7,)], ids=str)
def test_fp16_squares_that_leave_fp16(place: Place, shape: tuple[int, ...], scale: float) -> None:
    param = torch.full(shape, 2.0**-14, dtype=torch.float16, device=place.device)
    grad = torch.full_like(param, scale)
    param.grad = grad.clone()
    clipping, agc_eps = 2.0**-6, 1e-6
    adaptive_clip_grad_([param], clipping=clipping, agc_eps=agc_eps, backend=place.backend)
    check_clipped(param, grad, param.grad, place, clipping=clipping, agc_eps=agc_eps)
    assert torch.equal(param.grad, grad) is (scale < 2**-20)
