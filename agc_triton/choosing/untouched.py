"""Forward and backward passes that leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agc_triton.model.entries import show_sharded
from agc_triton.sharded import local


@contextmanager
def untouched(model: nn.Module, params: Sequence[Tensor]) -> Iterator[None]:
    """Put back what passes through a model change, bit for bit, however the block ends.

    Parameters and buffers, every module's mode, ``.grad`` and ``requires_grad`` of the model's
    parameters and of ``params``, and the random numbers of Python, numpy, the CPU and the devices
    where parameters lie. Gradients are None when the block begins.
    """
    show_sharded(model)
    params = list({id(p): p for p in (*model.parameters(), *params)}.values())
    modes = [(module, module.training) for module in model.modules()]
    held: Any = [(of, dict(of)) for m in model.modules() for of in (m._parameters, m._buffers)]
    tensors = {id(t): _written(t) for _, had in held for t in had.values() if t is not None}
    values = [(t, t.clone()) for t in tensors.values()]
    leaves = [(p, p.requires_grad, p.grad) for p in params]
    with _random_numbers({p.device.type for p in params}):
        try:
            for p in params:
                p.grad = None
            yield
        finally:
            show_sharded(model)
            for entries, had in held:
                entries.clear()
                entries.update(had)
            with torch.inference_mode():  # also for buffers that were made in it
                for tensor, value in values:
                    tensor.copy_(value)
            for p, required, grad in leaves:
                p.requires_grad_(required).grad = grad
            for module, mode in modes:
                module.training = mode


def _written(tensor: Tensor) -> Tensor:
    """Its memory, each element once, apart from what autograd knows of it."""
    data = local(tensor).data
    if data.layout is torch.strided:
        data = data[tuple(slice(None) if step else slice(1) for step in data.stride())]
    return data


@contextmanager
def _random_numbers(devices: set[str]) -> Iterator[None]:
    """Go on afterwards with the random numbers that would have come without the block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))
        for device in devices - {"cpu", "meta"}:
            every: Any = range(torch.get_device_module(device).device_count())
            stack.enter_context(torch.random.fork_rng(every, device_type=device))
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
