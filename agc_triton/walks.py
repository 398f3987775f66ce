"""How plain CPU tensors are walked: their memory order and units, and the parts cut from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agc_triton.rule import TensorLists
from agc_triton.units import UnitLayout, memory_order, unit_layout

PLAIN = (Tensor, torch.nn.Parameter)

# By their index.
Tensors = Sequence[Tensor] | Mapping[int, Tensor]


class Walk(NamedTuple):
    """How a tensor is walked: how its dimensions are permuted to be contiguous, and its units.

    ``as_is`` where the tensor is its own view: every one counts, and between blocks that fill the
    caches even the smallest takes microseconds.
    """

    permutation: tuple[int, ...] | None
    layout: UnitLayout
    as_is: bool

    @property
    def strided(self) -> bool:
        """Whether a unit lies in several places."""
        return self.layout.outer > 1 and self.layout.units > 1

    def view(self, tensor: Tensor) -> Tensor:
        """In memory order: as it comes if one unit, else units first or (outer, units, inner)."""
        if self.as_is:
            return tensor
        outer, units, inner = self.layout
        if self.permutation is not None:
            tensor = tensor.permute(self.permutation)
        if units == 1 or (outer == 1 and tensor.shape[0] == units):
            return tensor
        return tensor.reshape(self.layout if outer > 1 else (units, inner))


def walk_order(param: Tensor, states: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The memory order in which a parameter and its states can be walked in step, or None.

    They must be plain dense CPU memory, not empty: no subclass, nothing complex, no lazy bits.
    """
    dtype, stride = param.dtype, param.stride()
    if not _is_plain(param) or dtype.is_complex or param.numel() == 0:
        return None
    order = memory_order(param)
    if order is None:
        return None
    for state in states:
        # A state loaded with other strides than its parameter's cannot be walked in step with it.
        alike = state.stride() == stride or memory_order(state) == order
        if not (alike and state.dtype == dtype and _is_plain(state)):
            return None
    return order


def find_walk(param: Tensor, states: Sequence[Tensor], unit_dim: int | None) -> Walk | None:
    """How a parameter and its states can be walked in step, or None where they cannot be."""
    order = walk_order(param, states)
    if order is None:
        return None
    permutation = None if param.is_contiguous() else order
    layout = unit_layout(param.shape, order, unit_dim)
    first = layout.outer == 1 and param.shape[:1] == (layout.units,)
    return Walk(permutation, layout, permutation is None and (layout.units == 1 or first))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.is_cpu and not tensor.is_neg()


class Cut(NamedTuple):
    """Part of a tensor, contiguous in memory if the tensor is walked as it lies there.

    ``rows`` and ``columns`` are start and size along the first two dimensions of its walk's view,
    and ``flat`` makes one row of what is between them; None and False leave it as it is.
    """

    member: int
    walk: Walk
    rows: tuple[int, int] | None = None
    flat: bool = False
    columns: tuple[int, int] | None = None

    def of(self, tensors: Tensors) -> Tensor:
        """The part of the ``member``-th tensor."""
        view = self.walk.view(tensors[self.member])
        if self.rows is not None:
            view = view.narrow(0, *self.rows)
        if self.flat:
            view = view.reshape(1, -1)
        return view if self.columns is None else view.narrow(1, *self.columns)


class Part(NamedTuple):
    """What one call updates: parts of tensors, and views of their parameters and states by role."""

    cuts: list[Cut]
    params: list[Tensor]
    states: tuple[list[Tensor], ...]

    def lists(self, grads: list[Tensor], steps: list[Tensor]) -> TensorLists:
        """What to update, with these gradients; ``steps`` are those of all tensors, if any."""
        own = [steps[cut.member] for cut in self.cuts] if steps else []
        return TensorLists(self.params, grads, self.states, own)


def cut_out(cuts: list[Cut], params: Tensors, states: Sequence[Tensors]) -> Part:
    """The part of these cuts; the list of a role without tensors stays empty."""
    roles = tuple([cut.of(role) for cut in cuts] if role else [] for role in states)
    return Part(cuts, [cut.of(params) for cut in cuts], roles)
