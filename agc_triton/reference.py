"""The torch path: unit norms, clipping, and torch's own update on slices that stay in cache.

It is the fallback where Triton cannot run and the oracle that kernels are compared with. No update
rule is written here: a `Rule` calls the functions that torch.optim itself calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from agc_triton.rule import Clip, Rule, TensorLists
from agc_triton.units import UnitLayout, memory_order, norm_dims, unit_layout

# Elements per block: p, g, two states and the scratch of one block stay in a last-level cache and
# the ~10 torch calls per block cost little beside it (benchmarks/torch_path.py --sweep).
BLOCK = 1 << 20

# One-unit tensors up to this many elements (biases, gains) go through in one foreach batch.
SMALL = 1 << 14

# What a block boundary is rounded to, so that vectorized torch kernels meet no odd tails inside.
ROW_MULTIPLE = 16


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 and complex128, fp32 for everything narrower."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def unit_norms(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """L2 norms over ``dims``, kept as size 1, accumulated in `norm_dtype`."""
    if not dims:
        return tensor.abs().to(norm_dtype(tensor.dtype))
    dtype = None if tensor.is_complex() else norm_dtype(tensor.dtype)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=dtype)
    return norms


def clip_factors(p_norm: Tensor, g_norm: Tensor, clip: Clip) -> Tensor:
    """What each unit's gradient is multiplied with: 1 up to the limit, limit / ||g|| above it.

    Source: Brock et al. 2021 (arXiv 2102.06171), equation 3; 1e-6 as in the authors' code.
    """
    limit = p_norm.clamp(min=clip.agc_eps).mul(clip.clipping)
    return torch.where(g_norm > limit, limit / g_norm.clamp(min=1e-6), 1.0)


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
    update = _block_update(rule, group)
    in_blocks, batched, whole = _partition(lists, group, clip)
    scratch: dict[torch.dtype, Tensor] = {}
    for i, order, layout in in_blocks:
        _step_blocks(update, lists.select([i]), group, clip, order, layout, scratch, grad_scale)
    for indices in batched:
        _step_batch(update, lists.select(indices), group, clip, grad_scale)
    if whole:
        _step_whole(rule.update, lists.select(whole), group, clip, grad_scale)


def clip_grad_(param: Tensor, grad: Tensor, clip: Clip) -> None:
    """Scale a dense ``grad`` in place; a unit at or under its limit keeps its bits."""
    order = memory_order(param) if _blockable(param, grad) else None
    if order is None or memory_order(grad) != order:
        grad.mul_(_tensor_factors(param, grad, clip))
        return
    layout = unit_layout(param.shape, order, clip.unit_dim)
    p, g = _memory_view(param, order, layout), _memory_view(grad, order, layout)
    for index, factors in _walk(p, g, clip, None):
        g[index].mul_(factors)


def _block_update(rule: Rule, group: Mapping[str, Any]) -> Callable[..., None]:
    """torch's fused kernels where the user left the choice open, else what was asked for."""
    fused = group.get("fused")
    if fused is None and group.get("foreach") is None and not group.get("capturable"):
        fused = True
    return rule.fused_update if fused and rule.fused_update else rule.update


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
) -> tuple[list[tuple[int, tuple[int, ...], UnitLayout]], list[list[int]], list[int]]:
    """Which parameters go in blocks, in one foreach batch per dtype, or whole."""
    in_blocks: list[tuple[int, tuple[int, ...], UnitLayout]] = []
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
            in_blocks.append((i, order, layout))
    return in_blocks, list(batched.values()), whole


def _alike(param: Tensor, order: tuple[int, ...], state: Tensor) -> bool:
    return state.stride() == param.stride() or memory_order(state) == order


def _memory_view(tensor: Tensor, order: tuple[int, ...], layout: UnitLayout) -> Tensor:
    """The tensor in memory order, (outer, units, inner); a view where its strides allow."""
    return tensor.permute(order).reshape(layout)


def _walk(
    p: Tensor, g: Tensor, clip: Clip, grad_scale: Tensor | None
) -> Iterator[tuple[Any, Tensor]]:
    """Blocks contiguous in memory, as an index into (outer, units, inner), and their factors."""
    outer, units, inner = p.shape
    rows = max(1, BLOCK // inner)
    if p.numel() <= BLOCK:
        yield ..., _block_factors(p, g, clip, grad_scale)
    elif outer > 1:
        factors = _block_factors(p, g, clip, grad_scale)
        count = max(1, BLOCK // (units * inner))
        for o in range(0, outer, count):
            yield slice(o, o + count), factors
    else:
        rows -= rows % ROW_MULTIPLE if rows > ROW_MULTIPLE else 0
        for u in range(0, units, rows):
            at = (slice(None), slice(u, u + rows))
            factors = _block_factors(p[at], g[at], clip, grad_scale)
            for i in range(0, inner, BLOCK):
                yield at if inner <= BLOCK else (*at, slice(i, i + BLOCK)), factors


def _block_factors(p: Tensor, g: Tensor, clip: Clip, grad_scale: Tensor | None) -> Tensor:
    """Factors of the units of a (outer, units, inner) block, shaped (1, units, 1)."""
    p_norm, g_norm = unit_norms(p, (0, 2)), unit_norms(g, (0, 2))
    if grad_scale is None:
        return clip_factors(p_norm, g_norm, clip)
    return clip_factors(p_norm, g_norm / grad_scale, clip) / grad_scale


def _step_blocks(
    update: Callable[..., None],
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip,
    order: tuple[int, ...],
    layout: UnitLayout,
    scratch: dict[torch.dtype, Tensor],
    grad_scale: Tensor | None,
) -> None:
    """One parameter, block after block: norms, scaled gradient into scratch, torch's update."""
    p, g = (_memory_view(t, order, layout) for t in (lists.params[0], lists.grads[0]))
    states = [[_memory_view(t, order, layout) for t in state] for state in lists.states]
    counted = lists.steps
    for index, factors in _walk(p, g, clip, grad_scale):
        block, given = (p, g) if index is ... else (p[index], g[index])
        out = scratch.get(p.dtype)
        if out is None or out.numel() < block.numel():
            out = scratch[p.dtype] = torch.empty(block.numel(), dtype=p.dtype)
        out = out[: block.numel()].view(block.shape)
        torch.mul(given, factors, out=out)
        # Every block starts from the same count, so that the parameter is counted up once.
        counted = lists.steps if index is ... else [t.clone() for t in lists.steps]
        parts = tuple([t if index is ... else t[index] for t in state] for state in states)
        update(TensorLists([block], [out], parts, counted), group)
    for t, count in zip(lists.steps, counted, strict=True):
        if t is not count:
            t.copy_(count)


def _step_batch(
    update: Callable[..., None],
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip,
    grad_scale: Tensor | None,
) -> None:
    """Many small tensors of one real dtype, each a single unit, with one call per operation."""
    p_norms = torch.stack(torch._foreach_norm(lists.params))
    g_norms = torch.stack(torch._foreach_norm(lists.grads))
    if grad_scale is None:
        factors = clip_factors(p_norms, g_norms, clip)
    else:
        factors = clip_factors(p_norms, g_norms / grad_scale, clip) / grad_scale
    # A clone keeps the parameter's memory order, which is how fused kernels walk the gradient.
    grads = [torch.empty_like(p).copy_(g) for p, g in zip(lists.params, lists.grads, strict=True)]
    torch._foreach_mul_(grads, factors.unbind())
    update(lists._replace(grads=grads), group)


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
    for param, given in zip(lists.params, lists.grads, strict=True):
        grad = given if grad_scale is None else given / grad_scale.to(given.device)
        # Autograd needs the weights that the norm was taken of, which the update overwrites.
        weight = param.clone() if torch.is_grad_enabled() else param
        grads.append((grad * _tensor_factors(weight, grad, clip)).to(given.dtype))
    update(lists._replace(grads=grads), group)


def _tensor_factors(param: Tensor, grad: Tensor, clip: Clip) -> Tensor:
    """Factors that broadcast against ``grad``, from any strides."""
    dims = norm_dims(param.shape, clip.unit_dim)
    return clip_factors(unit_norms(param, dims), unit_norms(grad, dims), clip)
