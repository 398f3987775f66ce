"""Gradients that are not finite: units to skip, how many there were, and the check that raises."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from agc_triton.rule import TensorLists, Update
from agc_triton.sharded import local, mesh_groups
from agc_triton.validation import tensor_name

NONFINITE = ("propagate", "skip_unit", "raise")


def check_nonfinite(nonfinite: str) -> None:
    """Check the ``nonfinite`` argument.

    Raises:
        ValueError: not one of ``NONFINITE``.
    """
    if nonfinite not in NONFINITE:
        raise ValueError(
            f"Invalid nonfinite: {nonfinite!r}; it must be one of {', '.join(NONFINITE)}"
        )


class SavedUnits:
    """A copy of the units to leave alone, of parameters and states that an update overwrites.

    ``factors`` are NaN for these units; they broadcast against the ``tensors``.
    """

    def __init__(self, tensors: Sequence[Tensor], factors: Tensor) -> None:
        self._bad = factors.isnan()
        self._tensors = tensors if self._bad.any() else ()
        self._values = [tensor.masked_select(self._bad) for tensor in self._tensors]

    def restore(self) -> None:
        """Put them back."""
        for tensor, values in zip(self._tensors, self._values, strict=True):
            tensor.masked_scatter_(self._bad, values)


def update_others(update: Update, lists: TensorLists, bad: Sequence[Tensor]) -> None:
    """Update all units but the bad ones, which broadcast, without waiting for the device."""
    # Copies are updated, as autograd lets nothing be written back to what it has used.
    states = tuple([state.clone() for state in role] for role in lists.states)
    copies = lists._replace(params=[param.clone() for param in lists.params], states=states)
    update(copies)
    roles = zip((lists.params, *lists.states), (copies.params, *states), strict=True)
    for before, after in roles:
        for skipped, old, new in zip(bad[: len(before)], before, after, strict=True):
            old.copy_(torch.where(skipped, old, new))


def agreed(found_inf: Tensor | None, ranks: Sequence[Any]) -> Tensor | None:
    """GradScaler's verdict over all ranks of these process groups, if there is one.

    torch goes by the placement of the first gradient alone.
    """
    if found_inf is not None:
        found_inf = found_inf.clone()
        for group in ranks:
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, group)
    return found_inf


def check_finite(groups: Sequence[Mapping[str, Any]], remedy: str) -> None:
    """Check all elements of all gradients, with one wait per device; ranks agree about DTensors'.

    ``remedy`` ends the message: what has happened and what to do.

    Raises:
        RuntimeError: one is NaN or infinite, on every rank that has a part of any of them.
    """
    at: defaultdict[torch.device, list[tuple[int, int]]] = defaultdict(list)
    found: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            here = param.grad if param.grad is None else _values(local(param.grad))
            if here is None or not here.numel():  # another rank may have some
                here = torch.zeros(1, device=local(param).device)
            at[here.device].append((index, i))
            found[here.device].append(_fault(here))
    for device, faults in found.items():
        ranks = mesh_groups([groups[index]["params"][i] for index, i in at[device]])
        rank = torch.distributed.get_rank() if ranks else 0
        # The rank is in the number, so that the largest over all ranks says who has it.
        flags = torch.stack(faults)
        flags = torch.where(flags > 0, flags + 2 * rank, 0)
        for ranks_of in ranks:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, ranks_of)
        numbers = flags.tolist()
        for (index, i), number in zip(at[device], numbers, strict=True):
            if number:
                where, nan = divmod(number - 1, 2)
                raise RuntimeError(
                    f"the gradient of {tensor_name(groups[index], index, i)} holds"
                    f" {'NaN' if nan else 'inf'}{f' on rank {where}' if ranks else ''} and"
                    f" nonfinite='raise'; {remedy}"
                )


def _fault(values: Tensor) -> Tensor:
    """0 where all is finite, 1 with an infinity, 2 with NaN; in one pass."""
    low, high = values.aminmax()
    infinite = low.isinf() | high.isinf()
    return torch.where(low.isnan(), 2, infinite.long())


def _values(grad: Tensor) -> Tensor:
    """A gradient's real elements; those of a sparse one are added up first."""
    grad = grad.detach()
    if grad.layout is torch.sparse_coo:
        grad = grad.coalesce().values()
    return torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
