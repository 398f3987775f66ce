"""What the tests that need a GPU share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cases import NAMES, STATEFUL
from tests.support.triton_cases import TRITON, make_grad, make_weight

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    # torch.optim's, on the eager steps before a capture.
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
]

# Several units to a program, a gain, units in registers, a unit in parts.
SHAPES = ((3, 20), (7, 1, 1, 1), (2, 700), (1, 2, 10_245))
every_rule = pytest.mark.parametrize("name", NAMES)


def make_params(device: str = "cuda") -> list[Tensor]:
    return [make_weight(shape, seed=i).float().to(device) for i, shape in enumerate(SHAPES)]


def make_grads(seed: int, device: str = "cuda") -> list[Tensor]:
    return [make_grad(s, seed=10 * seed + i).float().to(device) for i, s in enumerate(SHAPES)]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def copy_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """New values in the same memory, as a replayed backward pass writes them."""
    for p, grad in zip(params, grads, strict=True):
        assert p.grad is not None
        p.grad.copy_(grad)


def capturable(name: str) -> dict[str, Any]:
    """Every state, a learning rate on the device, and capturable where torch.optim has it."""
    options = {**STATEFUL[name], **TRITON, "lr": torch.tensor(0.5, device="cuda")}
    return options if name == "SGD" else {**options, "capturable": True}


@contextmanager
def side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
