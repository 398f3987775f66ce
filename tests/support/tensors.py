"""Weights and gradients on any device, and what tests ask of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Shape = Sequence[int]
UnitDim = int | None

# A matrix, a filter bank, a bias, a gain shaped (C, 1, 1, 1) and a scalar.
SHAPES = ((6, 5), (4, 3, 2, 2), (6,), (4, 1, 1, 1), ())
# Quick in the interpreter, aligned or not.
FEW_SHAPES = ((3, 20), (6,), (2, 12))
# Several units to a program, a gain, units in registers, a unit in parts.
TILE_SHAPES = ((3, 20), (7, 1, 1, 1), (2, 700), (1, 2, 10_245))

# By turns: of a unit's gradients, and of gradients of units side by side, every other one is over
# the limits that tests set.
WEIGHT_SCALES = (1.0, 0.5, 2.0)
GRAD_SCALES = (1.0, 0.003, 10.0, 0.0003)


def _unit_values(
    shape: Shape, unit_dim: UnitDim, scales: Sequence[float], seed: int, dtype: torch.dtype
) -> Tensor:
    """Normal values times a scale per unit, from the first of ``scales`` on.

    The same numbers in each dtype. The first and the last element of a unit hold most of its norm:
    losing one shows.
    """
    if dtype.is_complex:
        parts = (_unit_values(shape, unit_dim, scales, 2 * seed + i, torch.float64) for i in (0, 1))
        return torch.complex(*parts).to(dtype)
    rng = torch.Generator("cpu").manual_seed(seed)
    if 0 in shape:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    whole = sum(size != 1 for size in shape) <= 1
    dim = 0 if unit_dim is None or whole else unit_dim % len(shape)
    units = 1 if whole else shape[dim]
    length = math.prod(shape) // units
    rows = torch.randn(units, length, generator=rng, dtype=torch.float64, device="cpu")
    rows[:, 0] = math.sqrt(length)
    rows[:, -1] = -math.sqrt(length)
    turns = [scales[unit % len(scales)] for unit in range(units)]
    rows *= torch.tensor(turns, dtype=torch.float64, device="cpu")[:, None]
    if whole:
        return rows.reshape(tuple(shape)).to(dtype)
    rest = [size for d, size in enumerate(shape) if d != dim]
    return rows.reshape(units, *rest).movedim(0, dim).contiguous().to(dtype)


def weight(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    unit_dim: UnitDim = None,
) -> Tensor:
    """A weight, contiguous."""
    scales = WEIGHT_SCALES[seed % 3 :] + WEIGHT_SCALES[: seed % 3]
    return _unit_values(shape, unit_dim, scales, seed, dtype).to(device)


def weights(
    shapes: Iterable[Shape] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    unit_dim: UnitDim = None,
) -> list[Tensor]:
    """A weight of each shape, each other numbers."""
    return [weight(s, dtype, device, seed + i, unit_dim) for i, s in enumerate(shapes)]


def parameters(
    shapes: Iterable[Shape] = SHAPES,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[Parameter]:
    """Weights that require a gradient."""
    return [Parameter(values) for values in weights(shapes, dtype, device, seed)]


def in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, with the dimensions in memory from the first of ``order`` to the last."""
    inverse = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(tuple(order)).contiguous().permute(inverse)


def grad_like(param: Tensor, seed: int = 0, unit_dim: UnitDim = None) -> Tensor:
    """A gradient as autograd leaves it: its parameter's device, dtype and memory order."""
    return grads_like([param], seed, unit_dim)[0]


def grads_like(params: Sequence[Tensor], seed: int = 0, unit_dim: UnitDim = None) -> list[Tensor]:
    """A gradient for each parameter; the first units are over their limits if ``seed`` is even."""
    scales = GRAD_SCALES[seed % 4 :] + GRAD_SCALES[: seed % 4]
    grads = []
    for i, param in enumerate(params):
        values = _unit_values(param.shape, unit_dim, scales, 1009 * seed + i, param.dtype)
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        grads.append(in_order(values, order).to(param.device))
    return grads


# How a gradient may lie in memory.
GRAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": lambda g: in_order(g, range(g.dim())[::-1]),
    "expanded": lambda g: g.flatten()[0].expand(g.shape),
    "partly expanded": lambda g: g[:1].expand(g.shape) if g.dim() else g,
    "sliced": lambda g: torch.stack([g, g], -1)[..., 0],
}


def assign(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Give parameters these very gradients."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def set_grads(params: Sequence[Tensor], seed: int) -> None:
    """Give parameters gradients that depend on the seed alone."""
    assign(params, grads_like(params, seed))


def moved(tensor: Tensor) -> Tensor:
    """A copy in other memory; what is left behind must not be written to."""
    return tensor.detach().clone()


def unaligned(tensor: Tensor) -> Tensor:
    """A copy whose address is a multiple of its itemsize only."""
    buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def bits(tensor: Tensor) -> Tensor:
    """The bytes, which tell -0.0 from 0.0 and one NaN from another."""
    return tensor.detach().cpu().resolve_conj().contiguous().flatten().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes, on whatever devices."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(bits(a), bits(b))


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures hold equal values of equal types, NaN equal to itself.

    Devices do not matter.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        kind = (a.layout, a.dtype, a.shape) == (b.layout, b.dtype, b.shape)
        if not kind or a.layout is torch.strided:
            return kind and torch.allclose(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)
        return same((a._indices(), a._values()), (b._indices(), b._values()))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))
