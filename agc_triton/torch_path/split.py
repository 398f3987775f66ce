"""Units that are split between ranks: local sums of squares, one all-reduce, torch's own update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.norms import Clip, clip_factors, norm_dtype, norms_over
from agc_triton.rule import Rule, TensorLists
from agc_triton.sharded import local, process_groups, split_dims
from agc_triton.units import unfolded


class SplitParam(NamedTuple):
    """A DTensor whose units are split along some dimensions of its mesh."""

    param: Tensor
    mesh_dims: tuple[int, ...]
    clip: Clip


class SplitLists(NamedTuple):
    """Those of a parameter group that have a gradient, and their local tensors."""

    params: list[Tensor]
    lists: TensorLists
    group: Mapping[str, Any]
    clip: Clip


class Sums(NamedTuple):
    """Where the sums of one tensor's units lie in a buffer: those of p, then those of g."""

    buffer: Any
    start: int
    units: int
    shape: list[int]


class SplitStep:
    """One step of all parameters whose units are split, in two beats.

    Args:
        rule: torch's update.
        grad_scale: divides the gradients first.
    """

    def __init__(self, rule: Rule, grad_scale: Tensor | None) -> None:
        self._rule, self._scale = rule, grad_scale
        self._params: list[SplitParam] = []
        self._split: list[SplitLists] = []
        self._waiting: list[Any] = []
        self._buffers: dict[Any, Tensor] = {}
        self._sums: dict[int, Sums] = {}

    def add(self, params: Sequence[Tensor], clip: Clip) -> None:
        """Sum over those of a group that are split, with a gradient here or not.

        Every rank has to sum as many units, in the order of the groups.
        """
        for param in params:
            mesh_dims = split_dims(param, clip.unit_dim)
            assert mesh_dims is not None
            self._params.append(SplitParam(param, mesh_dims, clip))

    def update_later(self, lists: TensorLists, group: Mapping[str, Any], clip: Clip) -> None:
        """Update these, DTensors all, once their sums are there."""
        here = [i for i, param in enumerate(lists.params) if local(param).numel()]
        if here:
            lists = lists.select(here)
            self._split.append(SplitLists(lists.params, lists.local(), group, clip))

    def begin(self) -> None:
        """Sum the squares of parameters and gradients of each unit here, and start adding up."""
        squares: defaultdict[Any, list[Tensor]] = defaultdict(list)
        groups: dict[Any, list[Any]] = {}
        for param, mesh_dims, clip in self._params:
            p = local(param)
            key = id(param.device_mesh), mesh_dims, p.device, norm_dtype(p.dtype)  # type: ignore[attr-defined]  # DTensor's
            groups[key] = process_groups(param, mesh_dims)
            dims = unfolded(param.shape, clip.unit_dim)[1]
            of_p = norms_over(p, dims).square()
            of_g = torch.zeros_like(of_p)
            if param.grad is not None:
                of_g = norms_over(self._unscaled(local(param.grad)), dims).square()
            start = sum(part.numel() for part in squares[key])
            self._sums[id(param)] = Sums(key, start, of_p.numel(), list(of_p.shape))
            squares[key] += [of_p.flatten(), of_g.flatten()]
        for key, parts in squares.items():
            self._buffers[key] = torch.cat(parts)
            self._add_up(self._buffers[key], groups[key])

    def update(self) -> None:
        """Wait for the sums, clip and update."""
        for work in self._waiting:
            work.wait()
        for params, lists, group, clip in self._split:
            grads = [
                self._clipped(param, grad, clip)
                for param, grad in zip(params, lists.grads, strict=True)
            ]
            self._rule.update(lists._replace(grads=grads), group)

    def _add_up(self, buffer: Tensor, groups: list[Any]) -> None:
        """Over the ranks of each group; of several the last is not waited for yet."""
        import torch.distributed as dist

        for group in groups:
            for work in self._waiting[-1:] if group is not groups[0] else ():
                work.wait()
            self._waiting.append(dist.all_reduce(buffer, group=group, async_op=True))

    def _unscaled(self, grad: Tensor) -> Tensor:
        return grad if self._scale is None else grad / self._scale.to(grad.device)

    def _clipped(self, param: Tensor, grad: Tensor, clip: Clip) -> Tensor:
        key, start, units, shape = self._sums[id(param)]
        of_both = self._buffers[key][start : start + 2 * units]
        p_norm, g_norm = (sums.sqrt().view(shape) for sums in (of_both[:units], of_both[units:]))
        return (self._unscaled(grad) * clip_factors(p_norm, g_norm, clip)).to(param.dtype)
