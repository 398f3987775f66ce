"""The optimizer pairs, small parameters and plain formulas that several test files share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from agc_triton import SGD_AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC

PAIRS: dict[Any, Any] = {SGD: SGD_AGC, Adam: Adam_AGC, AdamW: AdamW_AGC, RMSprop: RMSprop_AGC}
OURS = tuple(PAIRS.values())

# A matrix, a filter bank, a bias, a gain shaped (C, 1, 1, 1) and a scalar.
SHAPES = ((6, 5), (4, 3, 2, 2), (6,), (4, 1, 1, 1), ())


def clipped(
    weight: Tensor, grad: Tensor, clipping: float, agc_eps: float = 1e-3, unit_dim: int = 0
) -> Tensor:
    """Equation 3 of Brock et al. 2021 (arXiv 2102.06171), one unit after the other."""
    out = grad.clone()
    one_unit = sum(size != 1 for size in weight.shape) <= 1
    weights = (weight,) if one_unit else weight.unbind(unit_dim)
    for w, g in zip(weights, (out,) if one_unit else out.unbind(unit_dim), strict=True):
        limit = clipping * max(float(torch.linalg.norm(w)), agc_eps)
        norm = float(torch.linalg.norm(g))
        if norm > limit:
            g.mul_(limit / max(norm, 1e-6))
    return out


def make_params(
    shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Parameter]:
    """Standard normal parameters."""
    rng = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=rng, dtype=dtype)) for s in shapes]


def random_grad(weight: Tensor, seed: int) -> Tensor:
    """A gradient whose rows differ by decades: under and over any of the limits used here."""
    rng = torch.Generator().manual_seed(seed)
    rows = weight.shape[:1] + (1,) * (weight.dim() - 1)
    decades = torch.rand(rows, generator=rng, dtype=torch.float64) * 5 - 4
    grad = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
    return (grad * 10**decades).to(weight.dtype)


def set_grads(params: Sequence[Tensor], seed: int) -> None:
    """Give each parameter a gradient that depends on the seed alone."""
    for i, param in enumerate(params):
        param.grad = random_grad(param, 100 * seed + i)


def train(optimizer: Optimizer, params: Sequence[Tensor], steps: range) -> None:
    """One update per seed."""
    for seed in steps:
        set_grads(params, seed)
        optimizer.step()


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures hold equal values of equal types, NaN equal to itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        kind = (a.layout, a.dtype, a.shape) == (b.layout, b.dtype, b.shape)
        if not kind or a.layout is torch.strided:
            return kind and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        return same((a._indices(), a._values()), (b._indices(), b._values()))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


@contextmanager
def nothing_changes(params: Sequence[Tensor], optimizer: Optimizer | None = None) -> Iterator[None]:
    """Neither a bit of the parameters and gradients nor an optimizer's groups, state, defaults."""

    def snapshot() -> Any:
        tensors = [(p.detach(), p.grad) for p in params]
        kept = (optimizer.state_dict(), optimizer.defaults) if optimizer else None
        return copy.deepcopy((tensors, kept)), [id(p.grad) for p in params]

    before, grads = snapshot()
    yield
    after, grads_after = snapshot()
    assert same(before, after)
    assert grads == grads_after
