"""Training on ranks, recorded in full tensors, and the same made again in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Step = Callable[[], Any]


class Record(NamedTuple):
    """What a training starts with, the gradients of each step, and what it ends with."""

    start: list[Tensor]
    grads: list[list[Tensor | None]]
    end: list[Tensor]


def full(tensor: Any) -> Tensor:
    """A DTensor's value over all ranks; a copy of any other tensor."""
    with torch.no_grad():
        value: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return value.detach().clone()


def recorded(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], step: Step, keep: bool = False
) -> Record:
    """Train on one loss after the other; with ``keep`` gradients add up over pairs of them."""
    params = list(model.parameters())
    start, grads = [full(p) for p in params], []
    for i, loss in enumerate(losses):
        loss().backward()  # type: ignore[no-untyped-call]  # torch's
        if keep and i % 2 == 0:
            continue
        grads.append([None if p.grad is None else full(p.grad) for p in params])
        step()
        model.zero_grad()
    return Record(start, grads, [full(p) for p in params])


def again(record: Record, make: Callable[[list[Tensor]], Step]) -> list[Tensor]:
    """What plain tensors end with, given the same gradients."""
    params = [tensor.clone().requires_grad_() for tensor in record.start]
    step = make(params)
    for grads in record.grads:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        step()
    return params
