"""Scalars per parameter that the kernels count on: those in its state, and those of the plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class OwnScalars:
    """Scalars that torch's states have no place for, such as SGD's steps; they outlive plans."""

    def __init__(self) -> None:
        self._state: Any = None
        self._known: dict[Tensor, tuple[Tensor, ...]] = {}

    def of(
        self, state: Any, n: int, params: Sequence[Tensor], begun: set[Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """``n`` for each parameter, on its device: 1 where its states had begun, 0 elsewhere."""
        if state is not self._state:  # they go with the state that they were made for
            self._state, self._known = state, {}
        new = [p for p in params if p not in self._known or p not in begun]
        if new:
            values = [[float(p in begun)] * n for p in new]
            made = torch.tensor(values, dtype=torch.float32, device=params[0].device)
            self._known.update(zip(new, map(Tensor.unbind, made), strict=True))
        return [self._known[p] for p in params]


def on_device(scalars: list[Tensor], device: torch.device) -> list[Tensor]:
    """Scalars in fp32 on a device; those that are stay, as a captured graph may count there."""
    fits = [scalar.device == device and scalar.dtype == torch.float32 for scalar in scalars]
    others = [s.detach().reshape(()) for s, fit in zip(scalars, fits, strict=True) if not fit]
    if not others:
        return scalars
    first = others[0].device
    moved = torch.stack([s.to(first, torch.float32) for s in others]).to(device).unbind()
    rest = iter(moved)
    return [s if fit else next(rest) for s, fit in zip(scalars, fits, strict=True)]
