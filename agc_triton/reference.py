"""The torch path: unit norms, clipping, and torch's own update on slices that stay in cache.

It is the fallback where Triton cannot run and the oracle that kernels are compared with. No update
rule is written here: a `Rule` calls the functions that torch.optim itself calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agc_triton.nonfinite import Kept, update_others
from agc_triton.norms import clip_factors, norm_dtype, unit_norms
from agc_triton.rule import Clip, Rule, TensorLists, Update
from agc_triton.units import UnitLayout, memory_order, norm_dims, unit_layout

# Elements per block: p, g, two states and the scratch of one block stay in a last-level cache and
# the ~10 torch calls per block cost little beside it (benchmarks/torch_path.py --sweep).
BLOCK = 1 << 19

# One-unit tensors up to this many elements (biases, gains) go through in one foreach batch.
SMALL = 1 << 14

# What a block boundary is rounded to, so that vectorized torch kernels meet no odd tails inside.
ROW_MULTIPLE = 16


def step(
    rule: Rule,
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip,
    grad_scale: Tensor | None = None,
) -> None:
    """Clip and update one parameter group; ``lists.grads`` are only read.

    ``grad_scale`` (0-dim or one element) divides the gradients first, as torch.amp.GradScaler asks.
    """
    in_blocks, batched, whole = _partition(lists, group, clip)
    counted = [*in_blocks, *(i for indices in batched.values() for i in indices)]
    if lists.steps and counted:
        torch._foreach_add_([lists.steps[i] for i in counted], 1)
    updates: dict[torch.dtype, Update] = {}
    scratch = _Scratch()
    for i, (order, layout) in in_blocks.items():
        dtype = lists.params[i].dtype
        if dtype not in updates:
            updates[dtype] = _counted_update(rule, group, dtype)
        one = lists.select([i])
        _step_blocks(updates[dtype], one, clip, order, layout, scratch, grad_scale)
    for dtype, indices in batched.items():
        update = _counted_update(rule, group, dtype)
        _step_batch(update, lists.select(indices), clip, grad_scale)
    if whole:
        _step_whole(rule.update, lists.select(whole), group, clip, grad_scale)


def clip_grad_(param: Tensor, grad: Tensor, clip: Clip) -> None:
    """Scale a dense ``grad`` in place; a unit at or under its limit keeps its bits."""
    order = memory_order(param) if _blockable(param, grad) else None
    if order is None or memory_order(grad) != order:
        grad.mul_(_tensor_factors(param, grad, clip))
        return
    layout = unit_layout(param.shape, order, clip.unit_dim)
    views = [_memory_view(t, order, layout) for t in (param, grad)]
    for (_, block), factors in _walk(views, clip, None):
        block.mul_(factors)


def _counted_update(rule: Rule, group: Mapping[str, Any], dtype: torch.dtype) -> Update:
    """The update of steps counted already: torch's fused kernels unless the user chose others."""
    fused = group.get("fused")
    if fused is None and group.get("foreach") is None and not group.get("capturable"):
        fused = True
    update = rule.fused(group, dtype) if fused else None
    if update is not None:
        return update
    options = {**group, "fused": False}

    def uncounted(lists: TensorLists) -> None:
        rule.update(lists._replace(steps=[t - 1 for t in lists.steps]), options)

    return uncounted


def _blockable(*tensors: Tensor) -> bool:
    """Whether plain CPU memory can be walked: no subclass, no lazy bits, something real in it."""
    return all(
        t.device.type == "cpu"
        and type(t) in (Tensor, torch.nn.Parameter)
        and t.numel() > 0
        and not (t.is_complex() or t.is_neg())
        for t in tensors
    )


def _partition(
    lists: TensorLists, group: Mapping[str, Any], clip: Clip
) -> tuple[dict[int, tuple[tuple[int, ...], UnitLayout]], dict[torch.dtype, list[int]], list[int]]:
    """Which parameters go in blocks, in one foreach batch per dtype, or whole."""
    in_blocks: dict[int, tuple[tuple[int, ...], UnitLayout]] = {}
    batched: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    whole: list[int] = []
    walk = not group.get("foreach") and not group.get("differentiable")
    for i, param in enumerate(lists.params):
        states = [state[i] for state in lists.states if state]
        order = memory_order(param) if walk and _blockable(param, *states) else None
        # A state loaded with other strides than its parameter's cannot be walked in step with it.
        if order is None or not all(_alike(param, order, state) for state in states):
            whole.append(i)
            continue
        layout = unit_layout(param.shape, order, clip.unit_dim)
        if layout.units == 1 and layout.length <= SMALL and param.dtype == norm_dtype(param.dtype):
            batched[param.dtype].append(i)
        else:
            in_blocks[i] = order, layout
    return in_blocks, batched, whole


def _alike(param: Tensor, order: tuple[int, ...], state: Tensor) -> bool:
    return state.stride() == param.stride() or memory_order(state) == order


def _memory_view(tensor: Tensor, order: tuple[int, ...], layout: UnitLayout) -> Tensor:
    """The tensor in memory order: (units, inner), or (outer, units, inner) if there is an outer.

    A view where its strides allow. Every call counts: between blocks that fill the caches even the
    smallest takes about 10 microseconds.
    """
    if order != tuple(range(len(order))):
        tensor = tensor.permute(order)
    return tensor.reshape(layout if layout.outer > 1 else layout[1:])


class _Scratch:
    """Memory for one block's clipped gradient, used again for every block of a step."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def like(self, block: Tensor) -> Tensor:
        """Uninitialized, contiguous, with the block's shape and dtype."""
        dtype, shape = block.dtype, block.shape
        view = self._views.get((dtype, shape))
        if view is None:
            memory = self._memory.get(dtype)
            if memory is None or memory.numel() < block.numel():
                self._views.clear()
                memory = self._memory[dtype] = torch.empty(block.numel(), dtype=dtype)
            view = self._views[dtype, shape] = memory[: block.numel()].view(shape)
        return view


def _walk(
    views: list[Tensor], clip: Clip, grad_scale: Tensor | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Blocks contiguous in memory of p, g and whatever lies alike, each with its units' factors.

    ``views`` are what `_memory_view` makes of them.
    """
    *outer, units, inner = views[0].shape
    if outer:
        factors = _block_factors(views[0], views[1], (0, 2), clip, grad_scale)
        for block in _split(views, BLOCK // (units * inner), 0):
            yield block, factors
        return
    rows = BLOCK // inner
    if ROW_MULTIPLE < rows < units:
        rows -= rows % ROW_MULTIPLE
    for part in _split(views, rows, 0):
        factors = _block_factors(part[0], part[1], (1,), clip, grad_scale)
        for block in _split(part, BLOCK, 1):
            yield block, factors


def _split(tensors: Sequence[Tensor], size: int, dim: int) -> Iterable[tuple[Tensor, ...]]:
    """The tensors themselves where they are small enough, else parts of ``size`` >= 1 of each."""
    if tensors[0].shape[dim] <= max(1, size):
        return [tuple(tensors)]
    return zip(*(torch.split(t, max(1, size), dim) for t in tensors), strict=True)


def _block_factors(
    p: Tensor, g: Tensor, dims: tuple[int, ...], clip: Clip, grad_scale: Tensor | None
) -> Tensor:
    """Factors of a block's units, which broadcast against it."""
    p_norm = unit_norms(p, dims)
    if grad_scale is None:
        return clip_factors(p_norm, unit_norms(g, dims), clip)
    if clip.skipped is None:
        g_norm = unit_norms(g, dims) / grad_scale
    else:  # the squares of what is unscaled decide, as in the kernels
        g_norm = unit_norms(g.to(norm_dtype(g.dtype)) / grad_scale, dims)
    return clip_factors(p_norm, g_norm, clip) / grad_scale


def _step_blocks(
    update: Update,
    lists: TensorLists,
    clip: Clip,
    order: tuple[int, ...],
    layout: UnitLayout,
    scratch: _Scratch,
    grad_scale: Tensor | None,
) -> None:
    """One parameter, block after block: norms, scaled gradient into scratch, torch's update."""
    tensors = [*lists.params, *lists.grads, *(t for state in lists.states for t in state)]
    views = [_memory_view(t, order, layout) for t in tensors]
    for (p, g, *states), factors in _walk(views, clip, grad_scale):
        out = scratch.like(p)
        torch.mul(g, factors, out=out)
        left = iter(states)
        roles = tuple([next(left) for _ in state] for state in lists.states)
        kept = None if clip.skipped is None else Kept((p, *states), factors)
        update(TensorLists([p], [out], roles, lists.steps))
        if kept is not None:
            kept.restore()


def _step_batch(
    update: Update,
    lists: TensorLists,
    clip: Clip,
    grad_scale: Tensor | None,
) -> None:
    """Many small tensors of one real dtype, each a single unit, with one call per operation."""
    if clip.skipped is not None and grad_scale is not None:
        lists, grad_scale = lists._replace(grads=[g / grad_scale for g in lists.grads]), None
    p_norms = torch.stack(torch._foreach_norm(lists.params))
    g_norms = torch.stack(torch._foreach_norm(lists.grads))
    if grad_scale is None:
        factors = clip_factors(p_norms, g_norms, clip)
    else:
        factors = clip_factors(p_norms, g_norms / grad_scale, clip) / grad_scale
    if clip.skipped is not None:
        finite = (~factors.isnan()).nonzero().flatten()
        lists, factors = lists.select(finite.tolist()), factors[finite]
        if not lists.params:
            return
    # A clone keeps the parameter's memory order, which is how fused kernels walk the gradient.
    grads = [torch.empty_like(p).copy_(g) for p, g in zip(lists.params, lists.grads, strict=True)]
    torch._foreach_mul_(grads, factors.unbind())
    update(lists._replace(grads=grads))


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
