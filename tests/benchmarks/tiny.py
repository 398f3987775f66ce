"""A small model with every kind of shape, in place of real ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

SHAPES = [(4, 3, 3, 3), (4, 1, 1, 1), (4,), (5, 6), (1, 7), ()]
ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES)


def write_shapes(path: Path, shapes: Iterable[tuple[int, ...]]) -> None:
    """A table of a model's shapes, as benchmarks/shapes has them."""
    rows = [f"p{i},{'x'.join(map(str, shape)) or 'scalar'}" for i, shape in enumerate(shapes)]
    path.write_text("\n".join(["name,shape", *rows]))
