"""Clip factors of the kernels: next to nothing, next to the limit, what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agc_triton import adaptive_clip_grad_
from tests.support.checks import check_clipped, oracle_for, step_and_check, step_with
from tests.support.optimizers import CLIPPING, EACH_WAY, STATEFUL, TRITON, build
from tests.support.places import DEVICE, KERNELS
from tests.support.tensors import assign, grad_like, grads_like, same, weight, weights

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

every_rule = pytest.mark.parametrize("name", EACH_WAY)


def weight_and_grad(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    param = weight((3, 6), dtype)
    grad = grad_like(param)
    if kind == "zero weights":
        param[1:] = 0.0
        grad[2] *= 1e-8
    elif kind == "zero gradients":
        grad[1] = 0.0
    elif kind == "tiny gradients":
        grad[1] *= 1e-9  # a norm under the 1e-6 of the definition
    return param.to(DEVICE), grad.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("agc_eps", [0.0, 1e-3, 1e-9])
@pytest.mark.parametrize("kind", ["zero weights", "zero gradients", "tiny gradients"])
def test_units_of_next_to_nothing(kind: str, agc_eps: float, dtype: torch.dtype) -> None:
    param, grad = weight_and_grad(kind, dtype)
    options = {"lr": 0.5, **TRITON, "agc_eps": agc_eps}
    oracle = oracle_for("SGD", [param], KERNELS, **options)
    step_and_check(build("SGD", [param], options), oracle, [param], [grad])


# numpy, which the interpreter computes with, warns of 0 * inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_rule
def test_what_is_not_finite_stays_in_its_unit_as_on_the_torch_path(name: str, value: float) -> None:
    results = []
    for backend in ("triton", "torch"):
        param = weight((3, 6), device=DEVICE)
        options = {**STATEFUL[name], "clipping": CLIPPING, "backend": backend}
        optimizer = build(name, [param], options)
        grad = grad_like(param)
        grad[1, 2] = value
        step_with(optimizer, [param], [grad])
        results.append([param.isnan(), *(x.isnan() for x in optimizer.state[param].values())])
    assert same(*results)
    assert bool(results[0][0].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_units_next_to_their_limit(dtype: torch.dtype) -> None:
    # Norms of 4, and so limits of 1.
    param = torch.full((2, 4), 2.0, dtype=dtype, device=DEVICE)
    grad = torch.zeros_like(param)
    grad[0, 1], grad[1, 2] = 1 - 1e-5, 1 + 1e-5
    param.grad = grad.clone()
    adaptive_clip_grad_([param], clipping=0.25, backend="triton")
    assert torch.equal(param.grad[0], grad[0])
    assert not torch.equal(param.grad[1], grad[1])
    check_clipped(param, grad, param.grad, clipping=0.25)


def test_at_a_limit_under_the_smallest_norm_divided_by_no_bit_changes() -> None:
    # Norm and limit are 2**-22, exactly; divided by 1e-6 it would be scaled to a quarter.
    param = torch.zeros(1, 4, device=DEVICE)
    param.grad = torch.zeros_like(param)
    param.grad[0, 1] = 2.0**-22
    before = param.grad.clone()
    adaptive_clip_grad_([param], clipping=0.5, agc_eps=2.0**-21, backend="triton")
    assert torch.equal(param.grad, before)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64],
    ids=str,
)
def test_clipping_alone(dtype: torch.dtype) -> None:
    params = weights(((4, 24), (2, 300), (7,), (3,)), dtype, DEVICE)
    grads = grads_like(params[:-1])
    kept = [p.clone() for p in params]
    assign(params[:-1], [grad.clone() for grad in grads])
    adaptive_clip_grad_(params, clipping=CLIPPING, backend="triton")
    assert same(params, kept)
    assert params[-1].grad is None
    for param, grad in zip(params[:-1], grads, strict=True):
        check_clipped(param, grad, param.grad)


@pytest.mark.parametrize("name", EACH_WAY)
def test_an_infinite_weight_without_decay_stays_infinite(name: str) -> None:
    start = weight((2, 3), device=DEVICE)
    start[0, 1] = torch.inf
    results = []
    for backend in ("triton", "torch"):
        param = start.clone()
        optimizer = build(name, [param], {**STATEFUL[name], "weight_decay": 0, "backend": backend})
        for seed in range(2):
            step_with(optimizer, [param], [grad_like(param, seed)])
        results.append(param)
    assert results[0].isinf().equal(start.isinf())
    torch.testing.assert_close(*results)
