"""How plain CPU tensors are walked: their memory order and units, and the slices taken of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from agc_triton.rule import TensorLists
from agc_triton.units import PLAIN, UnitDim, UnitLayout, memory_order, unit_layout

# By their index.
Tensors = Sequence[Tensor] | Mapping[int, Tensor]


class DenseView(NamedTuple):
    """A tensor as it lies in memory: how its dimensions are permuted for that, and its units.

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

    def of(self, tensor: Tensor) -> Tensor:
        """In memory order: as it comes if one unit, else units first, or as its layout says."""
        if self.as_is:
            return tensor
        _, outer, units, inner = self.layout
        if self.permutation is not None:
            tensor = tensor.permute(self.permutation)
        if units == 1 or (outer == 1 and tensor.shape[0] == units):
            return tensor
        return tensor.reshape(self.layout if outer > 1 else (units, inner))

    def norm_dims(self, dims: int) -> tuple[int, ...]:
        """The dimensions of a view of so many that units' norms are taken over."""
        return (1, 3) if self.strided else tuple(range(1, dims))


def dense_view(param: Tensor, states: Sequence[Tensor], unit_dim: UnitDim) -> DenseView | None:
    """How a parameter and its states can be walked in step, or None where they cannot be.

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
    permutation = None if param.is_contiguous() else order
    layout = unit_layout(param.shape, order, unit_dim)
    if layout is None:
        return None
    first = layout.outer == 1 and param.shape[:1] == (layout.units,)
    return DenseView(permutation, layout, permutation is None and (layout.units == 1 or first))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.is_cpu and not tensor.is_neg()


class Slice(NamedTuple):
    """A slice of a tensor, contiguous in memory if the tensor lies as its view says.

    ``rows`` and ``columns`` are start and size along the first two dimensions of the view, and
    ``flat`` makes one row of what is between them; None and False leave it as it is.
    """

    member: int
    view: DenseView
    rows: tuple[int, int] | None = None
    flat: bool = False
    columns: tuple[int, int] | None = None

    @property
    def n_units(self) -> int:
        """How many units it has, a part of each maybe."""
        if self.rows is None:
            return self.view.layout.n_units
        return self.rows[1] * (self.view.layout.units if self.view.strided else 1)

    def of(self, tensors: Tensors) -> Tensor:
        """The slice of the ``member``-th tensor."""
        view = self.view.of(tensors[self.member])
        if self.rows is not None:
            view = view.narrow(0, *self.rows)
        if self.flat:
            view = view.reshape(1, -1)
        return view if self.columns is None else view.narrow(1, *self.columns)


class Target(NamedTuple):
    """What one call updates: slices of tensors, of their parameters and of their states by role."""

    slices: list[Slice]
    params: list[Tensor]
    states: tuple[list[Tensor], ...]

    def lists(self, grads: list[Tensor], steps: Tensors, scalars: Sequence[Tensors]) -> TensorLists:
        """What to update, with these gradients; steps and scalars are those of all tensors."""
        own, *others = (
            [role[slice_.member] for slice_ in self.slices] if role else []
            for role in (steps, *scalars)
        )
        return TensorLists(self.params, grads, self.states, own, tuple(others))


def target_of(slices: list[Slice], params: Tensors, states: Sequence[Tensors]) -> Target:
    """The target of these slices; the list of a role without tensors stays empty."""
    roles = tuple([slice_.of(role) for slice_ in slices] if role else [] for role in states)
    return Target(slices, [slice_.of(params) for slice_ in slices], roles)
