"""The torch path: unit norms, clipping, and torch's own update on slices that stay in cache.

It is the fallback where Triton cannot run and the oracle that kernels are compared with. No update
rule is written here: a `Rule` calls the functions that torch.optim itself calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agc_triton.nonfinite import Kept, update_others
from agc_triton.norms import ONE, Clip, clip_factors, unit_norms
from agc_triton.rule import Batches, Rule, TensorLists, Update, at
from agc_triton.torch_path.blocks import Block, blocks, largest_room
from agc_triton.torch_path.plan import BlockPlan, Run
from agc_triton.torch_path.scratch import Scratch
from agc_triton.torch_path.slices import Tensors, Walk, find_walk
from agc_triton.units import norm_dims
from agc_triton.versions import count_writes


def ready(
    rule: Rule,
    plan: BlockPlan,
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip,
    grad_scale: Tensor | None,
) -> Callable[[], None]:
    """What clips and updates one parameter group; ``lists.grads`` are only read.

    Hyperparameters that torch cannot take raise here, before a step is counted. ``grad_scale``
    (0-dim or one element) divides the gradients first, as torch.amp.GradScaler asks.
    """
    updates = [_counted_update(rule, group, run.dtype) for run in plan.runs]

    def step() -> None:
        if lists.steps and plan.counted:
            _count(at(plan.counted, lists.steps))
        for run, update in zip(plan.runs, updates, strict=True):
            count_writes(at(run.indices, lists.params))
            _step_blocks(update, run, lists, clip, grad_scale)
        if plan.whole:
            _step_whole(rule.update, lists.select(plan.whole), group, clip, grad_scale)

    return step


def step_unclipped(
    rule: Rule,
    batches: Batches,
    group: Mapping[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update one parameter group as torch.optim does."""
    for lists, options in batches:
        scaler: dict[str, Tensor | None] = {}
        if grad_scale is None or group.get("fused"):
            scaler = {"grad_scale": grad_scale, "found_inf": found_inf}
        else:
            grads = [g / grad_scale.to(g.device) for g in lists.grads]
            lists = lists._replace(grads=grads)
        rule.update(lists, options, **scaler)


def clip_grads_(params: Sequence[Tensor], clip: Clip) -> None:
    """Scale dense gradients in place; a unit at or under its limit keeps its bits."""
    grads: list[Any] = [param.grad for param in params]
    by_dtype: defaultdict[torch.dtype, dict[int, Walk]] = defaultdict(dict)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        walk = find_walk(param, [grad], clip.unit_dim)
        if walk is None:
            grad.mul_(_tensor_factors(param, grad, clip))
        else:
            by_dtype[param.dtype][i] = walk
    for walks in by_dtype.values():
        found = blocks(walks, params, [grads])
        scratch = Scratch(largest_room(found))
        for block in found:
            factors = block.factors(block.whole.states[0], clip, None, scratch)
            for part in block.parts:
                block.scale_(part.states[0], factors)


def _count(steps: list[Tensor]) -> None:
    """Add 1 to step counts, which other tools may keep as integers."""
    usual = {step.dtype for step in steps} == {torch.float32}
    one = ONE if usual else torch.ones((), dtype=torch.int64, device="cpu")
    # With alpha the number is not made a tensor for every count.
    torch._foreach_add_(steps, one, alpha=1)


def _counted_update(rule: Rule, group: Mapping[str, Any], dtype: torch.dtype) -> Update:
    """The update of steps counted already: torch's fused kernels unless the user chose others."""
    fused = group.get("fused")
    if fused is None and group.get("foreach") is None:
        fused = True
    update = rule.fused(group, dtype) if fused else None
    if update is not None:
        return update
    options = {**group, "fused": False}

    def uncounted(lists: TensorLists) -> None:
        rule.update(lists._replace(steps=[t - 1 for t in lists.steps]), options)

    return uncounted


def _step_blocks(
    update: Update, run: Run, lists: TensorLists, clip: Clip, grad_scale: Tensor | None
) -> None:
    """Block after block: norms, scaled gradients, torch's update."""
    own: Tensors = lists.grads
    if not run.alike:
        own = {i: torch.empty_like(lists.params[i]).copy_(lists.grads[i]) for i in run.indices}
    scratch = Scratch(run.largest_room)
    # All views first: between blocks that fill the caches each would take several times as long.
    bound = [_bind(block, own, lists.steps, scratch) for block in run.blocks]
    for block, (grads, targets) in zip(run.blocks, bound, strict=True):
        factors = block.factors(grads, clip, grad_scale, scratch)
        for theirs, target in targets:
            block.scale(theirs, factors, target.grads, scratch)
            if clip.skipped is None:
                update(target)
            else:
                _update_others(update, target, block.each(factors))


def _bind(
    block: Block,
    own: Tensors,
    steps: list[Tensor],
    scratch: Scratch,
) -> tuple[list[Tensor], list[tuple[list[Tensor], TensorLists]]]:
    """A block's gradients, and for every part its own and what to update.

    The gradients of the latter are room for the clipped ones.
    """
    grads = [cut.of(own) for cut in block.whole.cuts]
    targets = []
    for part in block.parts:
        theirs = grads if part is block.whole else [cut.of(own) for cut in part.cuts]
        targets.append((theirs, part.lists(block.room(part, scratch), steps)))
    return grads, targets


def _update_others(update: Update, lists: TensorLists, factors: list[Tensor]) -> None:
    """Update with clipped gradients; units to be skipped are put back."""
    views = zip(lists.params, *filter(None, lists.states), strict=True)
    kept = [Kept(own, factor) for own, factor in zip(views, factors, strict=True)]
    update(lists)
    for units in kept:
        units.restore()


def _step_whole(
    update: Callable[..., None],
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip,
    grad_scale: Tensor | None,
) -> None:
    """Any device, strides or subclass, differentiable too: clipped copies, torch's update."""
    if group.get("fused") and lists.params[0].device.type == "cpu":
        # torch's fused CPU kernels take every tensor for dense and alike in memory.
        group = {**group, "fused": False}
    grads = []
    bad: list[Tensor] = []
    skipped, clip = clip.skipped, clip._replace(skipped=None)
    for param, given in zip(lists.params, lists.grads, strict=True):
        grad = given if grad_scale is None else given / grad_scale.to(given.device)
        if skipped is not None:
            bad.append(skipped.find(unit_norms(grad, norm_dims(param.shape, clip.unit_dim))))
            # Without NaN there is none in what autograd makes of the update either.
            grad = grad.masked_fill(bad[-1], 0.0)
        # Autograd needs the weights that the norm was taken of, which the update overwrites.
        weight = param.clone() if torch.is_grad_enabled() else param
        grads.append((grad * _tensor_factors(weight, grad, clip)).to(given.dtype))
    lists = lists._replace(grads=grads)
    if skipped is None:
        update(lists, group)
    else:
        update_others(lambda copies: update(copies, group), lists, bad)


def _tensor_factors(param: Tensor, grad: Tensor, clip: Clip) -> Tensor:
    """Factors that broadcast against ``grad``, from any strides."""
    dims = norm_dims(param.shape, clip.unit_dim)
    return clip_factors(unit_norms(param, dims), unit_norms(grad, dims), clip)
