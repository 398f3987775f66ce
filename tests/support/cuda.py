"""What the tests that need a GPU share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.optimizers import NAMES, STATEFUL, TRITON
from tests.support.tensors import TILE_SHAPES, weights

needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    # torch.optim's, on the eager steps before a capture.
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
]

every_rule = pytest.mark.parametrize("name", NAMES)


def cuda_weights() -> list[Tensor]:
    return weights(TILE_SHAPES, device="cuda")


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
    """What is done within is done on another stream, and waited for."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Waiting for the device raises."""
    torch.cuda.synchronize()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode("default")
