"""What of each parameter the kernels work on, made ready: states, scalars, layout, records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from agc_triton.exchange import Exchange
from agc_triton.records import Recording, UnitOrder
from agc_triton.rule import Work
from agc_triton.sharded import local
from agc_triton.triton_path.launch_group import Member, kernel_layout
from agc_triton.triton_path.launches import PlacedRecords
from agc_triton.triton_path.scalars import OwnScalars, on_device
from agc_triton.units import memory_order
from agc_triton.validation import check_grad, check_states

# A parameter and the index of its group.
Placed = tuple[Tensor, int]


def create_states(work: Work, index: int, params: list[Tensor]) -> None:
    """States of parameters with a gradient; step counts on their device from the start."""
    options = {**work.groups[index], "params": params, "fused": None, "capturable": True}
    work.collect(options)


def members_of(
    work: Work,
    placed: list[Placed],
    own: OwnScalars,
    begun: set[Tensor],
    exchange: Exchange | None,
) -> list[Member]:
    """Members of one launch group; states and scalars are laid out as the kernels need them."""
    rule, params = work.rule.kernel, [p for p, _ in placed]
    device, group = params[0].device, work.groups[placed[0][1]]
    scalars: list[tuple[Tensor, ...]] = [()] * len(params)
    for key in rule.scalars:
        held = on_device([work.state[p][key] for p in params], device)
        for p, scalar in zip(params, held, strict=True):
            work.state[p][key] = scalar
        scalars = [(*before, scalar) for before, scalar in zip(scalars, held, strict=True)]
    if rule.own_scalars:
        of_plan = own.of(work.state, rule.own_scalars, params, begun)
        scalars = [(*before, *more) for before, more in zip(scalars, of_plan, strict=True)]
    members = []
    for (p, index), of_param in zip(placed, scalars, strict=True):
        states = tuple(_laid_out_as(p, work.state[p], key) for key in rule.states(group))
        layout = kernel_layout(p, work.groups[index]["unit_dim"])
        place = None if exchange is None else exchange.place(p)
        members.append(Member(p, layout, index, of_param, states, place))
    return members


def _laid_out_as(param: Tensor, entry: dict[str, Any], key: str) -> Tensor:
    """A state; where it is not in the parameter's memory order, a copy takes its place."""
    state = local(entry[key])
    if memory_order(state) != memory_order(local(param)) or state.is_conj() or state.is_neg():
        entry[key] = torch.empty_like(param).copy_(entry[key])
        state = local(entry[key])
    return state


def place_records(work: Work, placed: list[Placed], recording: Recording) -> PlacedRecords | None:
    """Where the records of one launch group go, if anything is recorded."""
    records = recording.of_plans
    if records is None:
        return None
    orders = [(p, UnitOrder.of_memory(p, work.groups[at]["unit_dim"])) for p, at in placed]
    page = records.page(placed[0][0].device, orders)
    return PlacedRecords(page, recording.skip, recording.tracking)


def check_members(work: Work, placed: Iterable[Placed]) -> None:
    """Check that gradients and states can be walked in step with their parameters."""
    position = {id(p): i for group in work.groups for i, p in enumerate(group["params"])}
    for p, index in placed:
        where = work.groups[index], index, position[id(p)]
        if p.grad is not None:
            check_grad(p, p.grad, *where)
        keys, entry = work.rule.kernel.states(work.groups[index]), work.state.get(p, {})
        check_states(p, {key: entry[key] for key in keys}, *where)


def has_states(work: Work, param: Tensor, index: int) -> bool:
    """Whether all that its rule keeps of a parameter is there."""
    rule, entry = work.rule.kernel, work.state.get(param, {})
    keys = (*rule.states(work.groups[index]), *rule.scalars)
    return all(isinstance(entry.get(key), Tensor) for key in keys)
