"""The torch path: unit norms, clipping, and torch's own update on slices that stay in cache.

It is the fallback where Triton cannot run and the oracle that kernels are compared with. No update
rule is written here: a `Rule` calls the functions that torch.optim itself calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.nonfinite import SavedUnits, update_others
from agc_triton.norms import ONE, Clip, as_computed, clip_factors, clipped_rows_, spread, unit_norms
from agc_triton.records import Units
from agc_triton.rule import Rule, TensorLists, Update, number
from agc_triton.torch_path.blocks import Block
from agc_triton.torch_path.plan import BlockList, BlockPlan
from agc_triton.torch_path.scratch import Scratch
from agc_triton.torch_path.slices import Tensors
from agc_triton.versions import count_writes


def prepare_group(
    rule: Rule,
    plan: BlockPlan,
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Callable[[], None]:
    """What clips and updates one parameter group; ``lists.grads`` are only read.

    Hyperparameters that torch cannot take raise here, before a step is counted. ``grad_scale``
    (0-dim) divides the gradients first, as torch.amp.GradScaler asks.
    """
    for value in rule.kernel.hyper(group):
        if not isinstance(value, Tensor):  # one on a device would be waited for
            number(value)
    if clip is None:
        return partial(_step_unclipped, rule, lists, group, grad_scale, found_inf)
    updates = [counted_update(rule, group, listed.dtype) for listed in plan.block_lists]

    def update() -> None:
        for listed, of_dtype in zip(plan.block_lists, updates, strict=True):
            _step_blocks(of_dtype, listed, lists, clip, grad_scale)
        if plan.whole:
            units = [plan.whole_units.get(i) for i in plan.whole]
            _step_whole(rule.update, lists.select(plan.whole), group, clip, grad_scale, units)

    return update


def _step_unclipped(
    rule: Rule,
    lists: TensorLists,
    group: Mapping[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update one parameter group as torch.optim does, on gradients of its parameters' dtypes."""
    if any(g.dtype != p.dtype for g, p in zip(lists.grads, lists.params, strict=True)):
        pairs = zip(lists.grads, lists.params, strict=True)
        lists = lists._replace(grads=[grad.to(param.dtype) for grad, param in pairs])
    scaler: dict[str, Tensor | None] = {}
    if grad_scale is None or group.get("fused"):
        scaler = {"grad_scale": grad_scale, "found_inf": found_inf}
    else:
        lists = lists._replace(grads=[g / grad_scale.to(g.device) for g in lists.grads])
    rule.update(lists, group, **scaler)


@torch.no_grad()
def track_unclipped(
    plan: BlockPlan, lists: TensorLists, clip: Clip, grad_scale: Tensor | None
) -> None:
    """Keep the ratios of units that `prepare_group` does not clip, before it updates them."""
    for i, units in plan.whole_units.items():
        grad = _unscaled(lists.grads[i], lists.params[i], grad_scale)
        norms = unit_norms(lists.params[i], clip.unit_dim), unit_norms(grad, clip.unit_dim)
        units.track(*norms, clip.agc_eps)


def count_steps(steps: list[Tensor]) -> None:
    """Add 1 to step counts, which other tools may keep as integers."""
    if not steps:
        return
    usual = {step.dtype for step in steps} == {torch.float32}
    one = ONE if usual else torch.ones((), dtype=torch.int64, device="cpu")
    # With alpha the number is not made a tensor for every count.
    torch._foreach_add_(steps, one, alpha=1)


class Counted(NamedTuple):
    """An update in two parts, as a tensor's slices are updated one after the other.

    ``advance`` moves the scalars of tensors on, once a step; ``update`` then takes steps that have
    been counted, and other scalars as they were.
    """

    advance: Update
    update: Update


def counted_update(rule: Rule, group: Mapping[str, Any], dtype: torch.dtype) -> Counted:
    """Torch's fused kernels unless the user chose others, or there are none."""
    update = fused_update(rule, group, dtype)
    if update is not None:
        return Counted(lambda lists: count_steps(lists.steps), update)
    chosen = group.get("foreach")
    options = {**group, "fused": False, "foreach": rule.foreach if chosen is None else chosen}

    def uncounted(lists: TensorLists) -> None:
        scalars = tuple([scalar.clone() for scalar in role] for role in lists.scalars)
        rule.update(lists._replace(steps=[t - 1 for t in lists.steps], scalars=scalars), options)

    def advance(lists: TensorLists) -> None:
        if not lists.scalars:
            return count_steps(lists.steps)
        # How torch moves scalars on it alone knows: it updates nothing but these.
        nothing = [torch.empty(0, dtype=dtype, device="cpu")] * len(lists.params)
        states = tuple(nothing if role else [] for role in lists.states)
        rule.update(lists._replace(params=nothing, grads=nothing, states=states), options)

    return Counted(advance, uncounted)


def fused_update(rule: Rule, group: Mapping[str, Any], dtype: torch.dtype) -> Update | None:
    """Torch's fused kernels on steps that have been counted, unless the user chose others."""
    fused = group.get("fused")
    if fused is None and group.get("foreach") is None:
        fused = True
    return rule.fused(group, dtype) if fused else None


def _step_blocks(
    counted: Counted, listed: BlockList, lists: TensorLists, clip: Clip, grad_scale: Tensor | None
) -> None:
    """Block after block: norms, scaled gradients, torch's update."""
    own: Tensors = lists.grads
    if not listed.alike:
        own = {i: torch.empty_like(lists.params[i]).copy_(lists.grads[i]) for i in listed.indices}
    scratch = Scratch(listed.largest_room)
    members = lists.select(listed.indices)
    scalars = [
        {i: scalar.clone() for i, scalar in zip(listed.indices, role, strict=True)}
        for role in members.scalars
    ]
    # All views first: between blocks that fill the caches each would take several times as long.
    bound = [_bind(block, own, lists.steps, scalars, scratch) for block in listed.blocks]
    begun = False
    for block, (grads, targets) in zip(listed.blocks, bound, strict=True):
        factors = block.factors(grads, clip, grad_scale, scratch)
        if not begun:  # what interrupts the first norms leaves no step counted
            counted.advance(members)
            count_writes(members.params)
            begun = True
        for theirs, target in targets:
            block.scale(theirs, factors, target.grads, scratch)
            if not clip.skip:
                counted.update(target)
            else:
                _update_others(counted.update, target, block.each(factors))


def _bind(
    block: Block,
    own: Tensors,
    steps: list[Tensor],
    scalars: Sequence[Tensors],
    scratch: Scratch,
) -> tuple[list[Tensor], list[tuple[list[Tensor], TensorLists]]]:
    """A block's gradients, and for every target its own and what to update.

    The gradients of the latter are room for the clipped ones.
    """
    grads = [slice_.of(own) for slice_ in block.whole.slices]
    targets = []
    for target in block.targets:
        alone = target is block.whole
        theirs = grads if alone else [slice_.of(own) for slice_ in target.slices]
        targets.append((theirs, target.lists(block.room(target, scratch), steps, scalars)))
    return grads, targets


def _update_others(update: Update, lists: TensorLists, factors: list[Tensor]) -> None:
    """Update with clipped gradients; units to be skipped are put back."""
    views = zip(lists.params, *filter(None, lists.states), strict=True)
    kept = [SavedUnits(own, factor) for own, factor in zip(views, factors, strict=True)]
    update(lists)
    for units in kept:
        units.restore()


def _step_whole(
    update: Callable[..., None],
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip,
    grad_scale: Tensor | None,
    units: Sequence[Units | None],
) -> None:
    """Any device, strides or subclass, differentiable too: clipped copies, torch's update."""
    if group.get("fused") and lists.params[0].device.type == "cpu":
        # torch's fused CPU kernels take every tensor for dense and alike in memory.
        group = {**group, "fused": False}
    grads = []
    bad: list[Tensor] = []
    for param, given, own in zip(lists.params, lists.grads, units, strict=True):
        if given.layout is not torch.strided:
            scaled = given.clone() if grad_scale is None else given / grad_scale.to(given.device)
            grads.append(clipped_rows_(param, scaled, clip, own))
            continue
        grad = _unscaled(given, param, grad_scale)
        if clip.skip:
            assert own is not None
            found = own.skip(unit_norms(grad, clip.unit_dim))
            bad.append(spread(found, param.shape, clip.unit_dim))
            # Without NaN there is none in what autograd makes of the update either.
            grad = grad.masked_fill(bad[-1], 0.0)
        # Autograd needs the weights that the norm was taken of, which the update overwrites.
        weight = param.clone() if torch.is_grad_enabled() else param
        factors = tensor_factors(weight, grad, clip._replace(skip=False), own)
        grads.append((grad * factors).to(param.dtype))
    lists = lists._replace(grads=grads)
    if not clip.skip:
        update(lists, group)
    else:
        update_others(lambda copies: update(copies, group), lists, bad)


def _unscaled(grad: Tensor, param: Tensor, grad_scale: Tensor | None) -> Tensor:
    grad = as_computed(grad, param)
    return grad if grad_scale is None else grad / grad_scale.to(grad.device)


def tensor_factors(param: Tensor, grad: Tensor, clip: Clip, units: Units | None = None) -> Tensor:
    """Factors that broadcast against ``grad``, from any strides."""
    norms = unit_norms(param, clip.unit_dim), unit_norms(grad, clip.unit_dim)
    return spread(clip_factors(*norms, clip, units), param.shape, clip.unit_dim)
