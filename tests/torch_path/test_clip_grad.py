"""adaptive_clip_grad_ and unitwise_norm against the formula, and what they must leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from agc_triton import adaptive_clip_grad_, unitwise_norm
from tests.support.checks import clipped
from tests.support.tensors import grad_like, parameters, same, set_grads

pytestmark = pytest.mark.usefixtures("either_block")

# A few roundings of each dtype: two norms, a quotient and a product. fp16 and bf16 round once.
RTOL = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (7,),
    (4, 1, 1, 1),
    (1, 7),
    (6, 5),
    (3, 4, 5),
    (4, 3, 2, 2),
    (2, 3, 2, 2, 2),
)


def bits(tensor: Tensor) -> list[Any]:
    """Everything, with the signs of zeros, which compare equal."""
    return [tensor.tolist(), torch.signbit(tensor).tolist()]


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (param,) = parameters([shape], dtype)
    for seed in range(4):
        grad = grad_like(param, seed)
        param.grad = grad.clone()
        adaptive_clip_grad_(param, clipping=0.03, agc_eps=1e-3)
        expected = clipped(param.detach().double(), grad.double(), 0.03)
        # Subnormal results, of fp16 that is below 6e-5, are rounded to multiples of this.
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(param.grad.double(), expected, rtol=RTOL[dtype], atol=step)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (4, 3)], ids=str)
def test_complex_units_have_the_norm_of_their_moduli(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    (param,) = parameters([shape], dtype)
    grad = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    param.grad = grad.clone()
    adaptive_clip_grad_(param, clipping=0.03)
    torch.testing.assert_close(param.grad, clipped(param.detach(), grad, 0.03))


# torch warns that it is experimental.
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("shape", [(), (1,), (300,), (4, 300)], ids=str)
def test_complex_units_of_fp16_whose_norms_leave_fp16(shape: tuple[int, ...]) -> None:
    param = Parameter(torch.full(shape, 0.5 + 0.5j, dtype=torch.complex32))
    grad = torch.full(shape, 5e4 - 5e4j, dtype=torch.complex32)
    param.grad = grad.clone()
    norms = unitwise_norm(grad)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, unitwise_norm(grad.to(torch.complex64)))
    adaptive_clip_grad_(param, clipping=0.05)
    wide = torch.complex64
    expected = clipped(param.detach().to(wide), grad.to(wide), 0.05)
    torch.testing.assert_close(param.grad.to(wide), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("unit_dim", [0, 1, 2, -1, -3])
def test_units_run_along_unit_dim(unit_dim: int) -> None:
    (param,) = parameters([(4, 3, 5)], torch.float64)
    grad = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    param.grad = grad.clone()
    adaptive_clip_grad_(param, clipping=0.1, unit_dim=unit_dim)
    torch.testing.assert_close(param.grad, clipped(param.detach(), grad, 0.1, unit_dim=unit_dim))


def test_unit_dim_does_not_matter_where_the_tensor_is_one_unit() -> None:
    params = parameters([(), (5,), (5, 1, 1)])
    set_grads(params, 0)
    expected = [clipped(p.detach(), p.grad, 0.01) for p in params if p.grad is not None]
    adaptive_clip_grad_(params, clipping=0.01, unit_dim=7)
    torch.testing.assert_close([p.grad for p in params], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_over_the_limit_the_norm_equals_it(dtype: torch.dtype) -> None:
    (param,) = parameters([(6, 50)], dtype)
    param.grad = 100 * torch.ones_like(param)
    adaptive_clip_grad_(param, clipping=0.01)
    limit = 0.01 * unitwise_norm(param.detach())
    torch.testing.assert_close(unitwise_norm(param.grad), limit, rtol=RTOL[dtype], atol=0)


@pytest.mark.parametrize("dtype", [*RTOL, torch.complex64], ids=str)
def test_under_the_limit_no_bit_changes(dtype: torch.dtype) -> None:
    param = Parameter(torch.ones(3, 4, dtype=dtype))
    tiny = torch.finfo(dtype).tiny
    grad = torch.tensor([[1e-3, -0.0, 0.0, 1e-3 / 3], [tiny, -tiny / 4, tiny / 2, 0.0], [0.0] * 4])
    param.grad = grad.to(dtype)
    before = param.grad.clone()
    adaptive_clip_grad_(param, clipping=0.01)
    parts = torch.view_as_real if dtype.is_complex else torch.Tensor.detach
    assert bits(parts(param.grad)) == bits(parts(before))


def test_at_the_limit_no_bit_changes_and_one_above_it_does() -> None:
    # ||w|| = 5 and ||g|| = 2.5 are exact: clipping 0.5 is a tie.
    param = Parameter(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    above = torch.nextafter(torch.tensor(2.0), torch.tensor(3.0)).item()
    param.grad = torch.tensor([[1.5, 2.0], [1.5 + 2**-20, above]])
    tie, over = param.grad.clone()
    adaptive_clip_grad_(param, clipping=0.5)
    assert bits(param.grad[0]) == bits(tie)
    assert torch.linalg.norm(param.grad[1]) < torch.linalg.norm(over)


def test_at_a_limit_under_the_smallest_norm_divided_by_no_bit_changes() -> None:
    # Norm and limit are 2**-22, exactly; divided by 1e-6 it would be scaled to a quarter.
    param = Parameter(torch.zeros(1, 2))
    param.grad = torch.tensor([[2.0**-22, 0.0]])
    before = param.grad.clone()
    adaptive_clip_grad_(param, clipping=0.5, agc_eps=2.0**-21)
    assert bits(param.grad) == bits(before)


@pytest.mark.parametrize("shape", [(4, 5), (5,), (5, 1, 1)], ids=str)
def test_zero_weights_get_a_limit_of_clipping_times_agc_eps(shape: tuple[int, ...]) -> None:
    param = Parameter(torch.zeros(shape))
    param.grad = torch.ones(shape)
    adaptive_clip_grad_(param, clipping=0.5, agc_eps=0.01)
    torch.testing.assert_close(
        unitwise_norm(param.grad), torch.full_like(unitwise_norm(param), 5e-3)
    )


def test_zero_gradients_of_zero_weights_stay_zero() -> None:
    param = Parameter(torch.zeros(3, 4))
    param.grad = torch.zeros(3, 4)
    adaptive_clip_grad_(param, clipping=0.01, agc_eps=0.0)
    assert bits(param.grad) == bits(torch.zeros(3, 4))


@pytest.mark.parametrize("scale", [300.0, 1e-5])
def test_fp16_gradients_whose_squares_leave_fp16(scale: float) -> None:
    param = Parameter(torch.full((4, 256), 1e-4, dtype=torch.float16))
    param.grad = torch.full((4, 256), scale, dtype=torch.float16)
    grad = param.grad.double()
    adaptive_clip_grad_(param, clipping=0.05)
    expected = clipped(param.detach().double(), grad, 0.05)
    assert not torch.equal(expected, grad)
    # Half the step between the fp16 numbers around the result, subnormal or not.
    torch.testing.assert_close(param.grad.double(), expected, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("clipping", [0, 0.0, None])
def test_no_clipping_touches_nothing(clipping: float | None) -> None:
    odd = Parameter(torch.ones(2, 3))
    odd.grad = torch.ones(2, 3)
    odd.data = torch.ones(2, 3, dtype=torch.float64)
    sparse = Parameter(torch.ones(2, 3, 4))
    sparse.grad = torch.ones(2, 3, 4).to_sparse()
    dense = Parameter(torch.ones(2, 3))
    dense.grad = torch.full((2, 3), math.inf)
    given = [p.grad for p in (odd, sparse, dense)]
    before = [g.clone() for g in given if g is not None]
    adaptive_clip_grad_([odd, sparse, dense], clipping=clipping)
    assert all(p.grad is g for p, g in zip((odd, sparse, dense), given, strict=True))
    assert same(before, given)


@pytest.mark.parametrize(
    "collect",
    [list, tuple, iter, lambda params: (p for p in params), lambda params: dict.fromkeys(params)],
    ids=["list", "tuple", "iterator", "generator", "dict keys"],
)
def test_takes_any_iterable(collect: Callable[[list[Parameter]], Iterable[Tensor]]) -> None:
    params = parameters()
    set_grads(params, 0)
    expected = [clipped(p.detach(), p.grad, 0.01) for p in params if p.grad is not None]
    adaptive_clip_grad_(collect(params), clipping=0.01)
    torch.testing.assert_close([p.grad for p in params], expected)


def test_takes_a_tensor_a_module_and_nothing() -> None:
    module = torch.nn.Linear(3, 2)
    set_grads(list(module.parameters()), 0)
    expected = [
        clipped(p.detach(), p.grad, 0.01) for p in module.parameters() if p.grad is not None
    ]
    adaptive_clip_grad_(module.weight)
    adaptive_clip_grad_(iter([module.bias]))
    torch.testing.assert_close([p.grad for p in module.parameters()], expected)
    adaptive_clip_grad_([])


def test_skips_what_has_no_gradient() -> None:
    params = parameters()
    set_grads(params[2:], 0)
    adaptive_clip_grad_(params)
    assert [p.grad is None for p in params] == [True, True, False, False, False]


def test_clips_in_place() -> None:
    params = parameters()
    set_grads(params, 0)
    grads = [p.grad for p in params]
    weights = [p.detach().clone() for p in params]
    addresses = [g.data_ptr() for g in grads if g is not None]
    adaptive_clip_grad_(params)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert addresses == [p.grad.data_ptr() for p in params if p.grad is not None]
    assert same(weights, [p.detach() for p in params])


def test_records_no_graph() -> None:
    param = Parameter(torch.ones(3, 4))
    (grad,) = torch.autograd.grad((param**3).sum(), param, create_graph=True)
    param.grad = grad.detach()
    adaptive_clip_grad_(param)
    assert not param.grad.requires_grad
    assert param.grad.grad_fn is None


def test_backend_torch_gives_the_same_bits_as_auto_on_a_cpu() -> None:
    grads = []
    for backend in ("auto", "torch"):
        params = parameters()
        set_grads(params, 0)
        adaptive_clip_grad_(params, backend=backend)
        grads.append([p.grad for p in params])
    assert same(*grads)
