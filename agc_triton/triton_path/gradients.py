"""Where the gradients of a plan's parameters lie, read again before every step."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from agc_triton.sharded import locals_of
from agc_triton.snapshot import Layouts
from agc_triton.units import memory_order

_grad = attrgetter("grad")


def grad_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient; its own where there is none."""
    return param.dtype if param.grad is None else param.grad.dtype


class Gradients:
    """Reads addresses; stands in with copies for gradients laid out unlike their parameters.

    Args:
        params: dense, of one dtype and device; none is kept alive.
        dtype: the gradients'.
        sharded: whether these are local tensors, and `read` is given DTensors.
    """

    def __init__(self, params: Sequence[Tensor], dtype: torch.dtype, sharded: bool = False) -> None:
        self._sharded = sharded
        self._layouts, self._kind = Layouts(params), (dtype, params[0].device)
        self._layouts.kinds = [self._kind] * len(params)
        self._shapes = self._layouts.shapes
        self._orders = [memory_order(p) for p in params]
        # Gradients that cannot be walked in step with their parameters, and copies that can.
        self._copies: list[tuple[Tensor, Tensor]] = []

    def read(self, params: Sequence[Tensor]) -> list[int] | None:
        """Addresses by parameter, 0 where there is no gradient; None if one does not fit."""
        self._copies = []  # an interrupted step leaves its own
        grads: list[Any] = list(map(_grad, params))
        if self._sharded:
            grads = locals_of(grads)
        if self._layouts.fit(grads):
            return list(map(Tensor.data_ptr, grads))
        return self._read_each(locals_of(params), grads)

    def _read_each(self, params: Sequence[Tensor], grads: list[Any]) -> list[int] | None:
        addresses = []
        for param, grad, shape, order in zip(
            params, grads, self._shapes, self._orders, strict=True
        ):
            if grad is None:
                addresses.append(0)
                continue
            if (
                grad.layout is not torch.strided
                or grad.shape != shape
                or (grad.dtype, grad.device) != self._kind
            ):
                return None
            if memory_order(grad) != order or grad.is_conj() or grad.is_neg():
                copy = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
                self._copies.append((grad, copy))
                grad = copy
            addresses.append(grad.data_ptr())
        if not self._copies and all(addresses):
            # Strides of dimensions of size 1 may differ: these are what to expect from now on.
            self._layouts = Layouts(grads)
            self._layouts.fit(grads)
        return addresses

    def write_back(self) -> None:
        """Put what was done to the copies into the gradients."""
        for grad, copy in self._copies:
            grad.copy_(copy)

    def drop_copies(self) -> None:
        """Free their memory."""
        self._copies = []
