"""A model whose gradients are what its batches say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tests.support.places import DEVICE
from tests.support.tensors import SHAPES, Shape, grads_like, weights

Grads = Sequence[Tensor | None]


def given_model(
    shapes: Iterable[Shape] = SHAPES, dtype: torch.dtype = torch.float32
) -> nn.ParameterDict:
    """Weights called p0, p1, ..."""
    values = weights(shapes, dtype, DEVICE)
    return nn.ParameterDict({f"p{i}": nn.Parameter(value) for i, value in enumerate(values)})


def given_batches(model: nn.ParameterDict, n: int = 3) -> list[Grads]:
    """Gradients for all parameters, other ones in each batch."""
    return [grads_like(list(model.values()), seed) for seed in range(n)]


def given_loss(model: nn.ParameterDict, grads: Grads) -> Tensor:
    """A loss with these gradients; None for a parameter that it does not depend on."""
    parts = [
        (p.to(torch.complex128) * g.conj()).real.sum()
        for p, g in zip(model.values(), grads, strict=True)
        if g is not None
    ]
    return torch.stack(parts).sum()
