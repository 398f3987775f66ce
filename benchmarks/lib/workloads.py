"""Parameters and gradients of real models: their shapes, filled with seeded random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from agc_triton import unitwise_norm
from agc_triton.optim.optimizer import AGC_EPS, CLIPPING

CPU = torch.device("cpu")
TABLES = Path(__file__).parents[1] / "shapes"


class Workload(NamedTuple):
    """What one step is measured on; runs work on copies."""

    model: str
    params: list[Tensor]
    grads: list[Tensor]


def model_names() -> list[str]:
    """The models whose shapes are in ``benchmarks/shapes``."""
    return sorted(path.stem for path in TABLES.glob("*.csv"))


def load_shapes(model: str) -> list[tuple[int, ...]]:
    """Shapes of a model's parameters, in its order, from ``benchmarks/shapes/MODEL.csv``."""
    table = pd.read_csv(TABLES / f"{model}.csv", dtype=str)
    return [
        () if shape == "scalar" else tuple(int(size) for size in shape.split("x"))
        for shape in table["shape"]
    ]


def random_workload(
    model: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device = CPU,
) -> Workload:
    """A workload with a model's shapes."""
    return workload_of(model, load_shapes(model), dtype, seed, device=device)


def workload_of(
    name: str,
    shapes: Iterable[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 4.0,
    device: torch.device = CPU,
) -> Workload:
    """Normal weights of unit norm about 1, and gradients of which half are over their limit.

    Each unit's gradient norm is its limit times ``spread ** x``, x uniform in [-1, 1]. They are
    drawn on the device, where that takes little time; each kind has random numbers of its own.
    """
    drawn: Any = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    params, grads = [], []
    for shape in shapes:
        p, g = (torch.randn(shape, **drawn) for _ in range(2))
        norm = unitwise_norm(p)
        p /= math.sqrt(p.numel() / norm.numel())
        target = limits(p) * spread ** (2 * torch.rand(norm.shape, **drawn) - 1)
        g *= target / unitwise_norm(g)
        params.append(p.to(dtype))
        grads.append(g.to(dtype))
    return Workload(name, params, grads)


def limits(param: Tensor) -> Tensor:
    """The largest gradient norm AGC leaves to each unit, with the default settings."""
    return CLIPPING * unitwise_norm(param).clamp(min=AGC_EPS)


def share_of_units_clipped(params: list[Tensor], grads: list[Tensor]) -> float:
    """The share of all units whose gradient is over its limit."""
    over = [unitwise_norm(g) > limits(p) for p, g in zip(params, grads, strict=True)]
    return sum(int(o.sum()) for o in over) / sum(o.numel() for o in over)
