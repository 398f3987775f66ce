"""Units that are split between ranks: their sums for an exchange, and torch's update after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from agc_triton.exchange import Exchange, Pool
from agc_triton.nonfinite import update_others
from agc_triton.norms import Clip, clip_factors, norms_over
from agc_triton.records import Page, UnitOrder, UnitRecords, Units
from agc_triton.rule import Rule, TensorLists, Update, pick
from agc_triton.sharded import axes_here, local, locals_of
from agc_triton.snapshot import Look
from agc_triton.torch_path.step import count_steps, fused_update
from agc_triton.units import UnitDim, unfolded


class SplitPlan:
    """The parameters of a group whose units are split, and where their sums go.

    Args:
        params: DTensors, all of which have a place in ``exchange``; with a gradient or without.
        exchange: where sums are added up.
        unit_dim: the group's.
        records: where something is kept of their units, if anything is.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exchange: Exchange,
        unit_dim: UnitDim,
        records: UnitRecords | None,
    ) -> None:
        by_pool: defaultdict[int, list[int]] = defaultdict(list)
        pools: dict[int, Pool] = {}
        for i, param in enumerate(params):
            place = exchange.place(param)
            assert place is not None
            if local(param).numel():  # the sums of what is empty stay 0
                by_pool[id(place.pool)].append(i)
                pools[id(place.pool)] = place.pool
        self._members = [
            PoolMembers(members, params, pools[key], exchange, unit_dim, records)
            for key, members in by_pool.items()
        ]

    @staticmethod
    def look(
        params: Sequence[Tensor],
        exchange: Exchange,
        unit_dim: UnitDim,
        records: UnitRecords | None,
    ) -> Look:
        """What it was made for, gradients included."""
        there = [p.grad for p in params if p.grad is not None]
        key = list(map(id, params)), len(there), id(exchange), unit_dim, records is None
        return Look(key, [], locals_of([*params, *there]), [])

    def begin(self, params: Sequence[Tensor], grad_scale: Tensor | None) -> None:
        """Sum the squares of parameters and unscaled gradients here, unit by unit."""
        for members in self._members:
            members.sum(params, grad_scale)

    def factors(
        self,
        params: Sequence[Tensor],
        clip: Clip,
        grad_scale: Tensor | None,
        number: int | None,
    ) -> dict[int, Tensor]:
        """Factors by the parameter's id, which broadcast; they divide by ``grad_scale`` as well.

        ``number`` is that of a step whose ratios are kept.
        """
        found: dict[int, Tensor] = {}
        for members in self._members:
            found |= members.factors(params, clip, grad_scale, number)
        return found


class PoolMembers:
    """Those of one pool, in the order of its calls: single units first."""

    def __init__(
        self,
        members: list[int],
        params: Sequence[Tensor],
        pool: Pool,
        exchange: Exchange,
        unit_dim: UnitDim,
        records: UnitRecords | None,
    ) -> None:
        self._pool = pool
        # All of a real tensor is one unit: one call for all of these.
        ones = [i for i in members if not axes_here(params[i], unit_dim)]
        ones = [i for i in ones if not params[i].is_complex()]
        self._ones, self._many = ones, [i for i in members if i not in ones]
        self._dims = [unfolded(params[i].shape, unit_dim)[1] for i in self._many]
        self._sizes, self._shapes = [], list[tuple[int, ...]]()
        rows: list[int] = []
        for i in [*self._ones, *self._many]:
            place = exchange.place(params[i])
            assert place is not None
            rows += range(place.first, place.first + place.units)
            self._sizes.append(place.units)
        for i, dims in zip(self._many, self._dims, strict=True):
            shape = local(params[i]).shape
            self._shapes.append(tuple(1 if d in dims else n for d, n in enumerate(shape)))
        self._rows = torch.tensor(rows, device=pool.own.device)
        self._page: Page | None = None
        if records is not None:
            each = [params[i] for i in [*self._ones, *self._many]]
            orders = [(param, UnitOrder.of_norms(param, unit_dim)) for param in each]
            self._page = records.page(pool.own.device, orders)

    def sum(self, params: Sequence[Tensor], grad_scale: Tensor | None) -> None:
        """Into the pool's own rows."""
        p_norms = self._norms(locals_of(params))
        g_norms = self._norms([None if p.grad is None else local(p.grad) for p in params])
        if grad_scale is not None:
            g_norms = g_norms / grad_scale.to(g_norms)
        self._pool.own.index_copy_(0, self._rows, torch.stack([p_norms, g_norms], 1).square_())

    def factors(
        self,
        params: Sequence[Tensor],
        clip: Clip,
        grad_scale: Tensor | None,
        number: int | None,
    ) -> dict[int, Tensor]:
        """As `SplitPlan.factors`."""
        p_norms, g_norms = self._pool.total.index_select(0, self._rows).sqrt_().unbind(1)
        with self._recorded(params, number) as units:
            factors = clip_factors(p_norms.contiguous(), g_norms.contiguous(), clip, units)
        if grad_scale is not None:
            factors = factors / grad_scale.to(factors)
        parts = torch.split(factors, self._sizes)
        n = len(self._ones)
        shaped = zip(parts[n:], self._shapes, strict=True)
        own = [*parts[:n], *(part.view(shape) for part, shape in shaped)]
        return {id(params[i]): part for i, part in zip(self._ones + self._many, own, strict=True)}

    @contextmanager
    def _recorded(self, params: Sequence[Tensor], number: int | None) -> Iterator[Units | None]:
        """Their records; in a tracked step those without a gradient here keep what they had."""
        page = self._page
        if page is None or number is None:
            yield None if page is None else page.units()
            return
        order = [*self._ones, *self._many]
        absent = [k for k, i in enumerate(order) if params[i].grad is None]
        kept = [(k, page.ratios[page.at(k)].clone(), page.numbers[k].clone()) for k in absent]
        yield page.units()
        page.numbers.fill_(number)
        for k, ratios, before in kept:
            page.ratios[page.at(k)], page.numbers[k] = ratios, before

    def _norms(self, tensors: Sequence[Any]) -> Tensor:
        """A norm per unit; 0 where there is no gradient."""
        dtype, device = self._pool.own.dtype, self._pool.own.device
        ones = [tensors[i] for i in self._ones]
        there = [tensor for tensor in ones if tensor is not None]
        each = iter(torch._foreach_norm(there, 2, dtype=dtype) if there else ())
        zero = torch.zeros((), dtype=dtype, device=device)
        found = [zero if tensor is None else next(each) for tensor in ones]
        parts = [torch.stack(found)] if found else []
        sizes = self._sizes[len(ones) :]
        for i, dims, size in zip(self._many, self._dims, sizes, strict=True):
            tensor = tensors[i]
            norms = zero.expand(size) if tensor is None else norms_over(tensor, dims).flatten()
            parts.append(norms)
        return torch.cat(parts)


def prepare_split(
    rule: Rule,
    lists: TensorLists,
    group: Mapping[str, Any],
    clip: Clip,
    factors: Callable[[], Mapping[int, Tensor]],
) -> Callable[[], None]:
    """What clips and updates what lies here of a group's split parameters, DTensors all.

    ``factors`` gives theirs once their sums are there.
    """
    keys, lists = list(map(id, lists.params)), lists.local()
    by_dtype: defaultdict[Any, list[int]] = defaultdict(list)
    for i, param in enumerate(lists.params):
        by_dtype[param.dtype, param.device].append(i)
    # What is empty here has no factors.
    empty = torch.ones((), device=lists.params[0].device)
    updates = [(at, _update_of(rule, group, lists.select(at))) for at in by_dtype.values()]

    def update() -> None:
        found = factors()
        own = [found.get(key, empty) for key in keys]
        for indices, update_some in updates:
            _clip_and_update(update_some, lists.select(indices), pick(indices, own), clip)

    return update


def _update_of(rule: Rule, group: Mapping[str, Any], lists: TensorLists) -> Update:
    """Torch's fused kernels where they can walk all of it, else what torch.optim would call."""
    if lists.params[0].device.type != "cpu":
        return lambda clipped: rule.update(clipped, group)
    tensors = chain(lists.params, lists.grads, *lists.states)
    fused = fused_update(rule, group, lists.params[0].dtype)
    if fused is None or not all(map(Tensor.is_contiguous, tensors)):
        options = {**group, "fused": False}
        return lambda clipped: rule.update(clipped, options)

    def update(clipped: TensorLists) -> None:
        count_steps(clipped.steps)
        fused(clipped)

    return update


def _clip_and_update(
    update: Update, lists: TensorLists, factors: Sequence[Tensor], clip: Clip
) -> None:
    bad: list[Tensor] = []
    grads = lists.grads
    if clip.skip:
        bad = [factor.isnan() for factor in factors]
        # Without NaN there is none in what torch makes of the update either.
        grads = [g.masked_fill(skip, 0.0) for g, skip in zip(grads, bad, strict=True)]
        factors = [factor.nan_to_num(1.0) for factor in factors]
    dtype = lists.params[0].dtype
    if {factors[0].dtype, *(grad.dtype for grad in grads)} == {dtype}:
        grads = list(torch._foreach_mul(grads, list(factors)))
    else:
        grads = [(g * f).to(dtype) for g, f in zip(grads, factors, strict=True)]
    lists = lists._replace(grads=grads)
    if not clip.skip:
        update(lists)
    else:
        update_others(update, lists, bad)
