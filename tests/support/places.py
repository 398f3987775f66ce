"""Where steps run: the torch path on a CPU or a GPU, the kernels on a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support import tensors
from tests.support.tensors import FEW_SHAPES, SHAPES, Shape, UnitDim


class Place(NamedTuple):
    """A backend, and the device of the parameters that it steps."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels."""
        return self.backend == "triton" and self.device == "cpu"

    def weight(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        unit_dim: UnitDim = None,
    ) -> Tensor:
        """A weight to be stepped here."""
        return tensors.weight(shape, dtype, self.device, seed, unit_dim)

    def weights(
        self,
        shapes: Iterable[Shape] = SHAPES,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        unit_dim: UnitDim = None,
    ) -> list[Tensor]:
        """A weight of each shape."""
        return tensors.weights(shapes, dtype, self.device, seed, unit_dim)


# Without a GPU the kernels run in Triton's interpreter, on CPU tensors (interpreter.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = Place("torch", "cpu")
KERNELS = Place("triton", DEVICE)
TORCH_PLACES = (CPU,) if DEVICE == "cpu" else (CPU, Place("torch", DEVICE))
PLACES = (*TORCH_PLACES, KERNELS)


def label(place: Place) -> str:
    """What a place is called in the names of tests."""
    return "triton" if place.backend == "triton" else "-".join(place)


def on_device(value: Any, device: str = DEVICE) -> Any:
    """Tensors, in a list or a dict or as they are, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device) for item in value)
    return value


def few_weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Of ``FEW_SHAPES``, where the kernels run."""
    return KERNELS.weights(FEW_SHAPES, dtype, seed)
