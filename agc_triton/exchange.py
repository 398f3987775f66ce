"""Squares of units that are split between ranks: one all-reduce per process group adds them up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, compress, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.norms import norm_dtype
from agc_triton.rule import Work
from agc_triton.sharded import (
    Kind,
    any_sharded,
    is_sharded,
    local,
    locals_of,
    mesh_groups,
    process_groups,
    units_here,
)
from agc_triton.snapshot import Cached, Look
from agc_triton.units import UnitDim


class Pool(NamedTuple):
    """Pairs of sums, of p and g, of one device and dtype: a row per unit.

    ``own`` are those of this rank, 0 where none of a unit lies here, and ``total`` those of all.
    """

    own: Tensor
    total: Tensor


class Place(NamedTuple):
    """Where the pairs of a parameter's units are: in a pool, from ``first`` on."""

    pool: Pool
    first: int
    units: int


class Collective(NamedTuple):
    """One all-reduce of rows ``start`` to ``stop`` of a pool."""

    pool: Pool
    group: Any
    start: int
    stop: int


class Exchange:
    """What is added up over ranks in a step.

    All ranks of a process group make the same collectives in the same order, whatever gradients
    they have and however little of a parameter lies on them.

    Args:
        members: parameters whose units are split between ranks, each with its ``unit_dim``.
    """

    def __init__(self, members: Sequence[tuple[Tensor, UnitDim]]) -> None:
        self._places: dict[int, Place] = {}
        self._pools: list[Pool] = []
        self.collectives: list[Collective] = []
        self._waiting: list[tuple[Collective, Any]] = []
        numbers: dict[str, int] = {}
        groups: list[Any] = []
        pools: defaultdict[Any, list[_Member]] = defaultdict(list)
        for param, unit_dim in members:
            own = process_groups(param, unit_dim)
            for group in own:
                if numbers.setdefault(group.group_name, len(groups)) == len(groups):
                    groups.append(group)
            over = tuple(sorted(numbers[group.group_name] for group in own))
            here = local(param)
            key = here.device, norm_dtype(here.dtype)
            pools[key].append(_Member(over, units_here(param, unit_dim), id(param)))
        for (device, dtype), own_members in pools.items():
            self._fill(own_members, groups, device, dtype)

    def place(self, param: Tensor) -> Place | None:
        """Where the sums of a parameter's units are; None if nothing of them lies elsewhere."""
        return self._places.get(id(param))

    def start(self) -> None:
        """Add up what this rank's are, without waiting for it."""
        import torch.distributed as dist

        for pool in self._pools:
            pool.total.copy_(pool.own)
        for collective in self.collectives:
            for before, work in self._waiting:
                if _overlap(before, collective):
                    work.wait()
            pool, group, start, stop = collective
            work = dist.all_reduce(pool.total[start:stop], group=group, async_op=True)
            self._waiting.append((collective, work))

    def wait(self) -> None:
        """Until the totals are there; on a GPU its stream waits, not the host."""
        waiting, self._waiting = self._waiting, []
        for _, work in waiting:
            work.wait()

    def _fill(
        self, members: list[_Member], groups: list[Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Lay out a pool so that what goes over one process group lies together."""
        members = sorted(members, key=lambda member: member.over)  # stable
        size = sum(member.units for member in members)
        with torch.inference_mode(False):
            pool = Pool(*(torch.zeros((size, 2), dtype=dtype, device=device) for _ in range(2)))
        self._pools.append(pool)
        first = 0
        rows: defaultdict[int, list[int]] = defaultdict(list)
        for over, units, key in members:
            self._places[key] = Place(pool, first, units)
            for number in over:
                rows[number] += range(first, first + units)
            first += units
        for number in sorted(rows):
            runs = _runs(rows[number])
            self.collectives += [Collective(pool, groups[number], *run) for run in runs]


class _Member(NamedTuple):
    over: tuple[int, ...]
    units: int
    key: int


def _runs(rows: Sequence[int]) -> Iterable[tuple[int, int]]:
    """First and last + 1 of each run of ascending numbers that follow each other."""
    breaks = [i for i, (a, b) in enumerate(pairwise(rows), 1) if b != a + 1]
    for start, stop in pairwise([0, *breaks, len(rows)]):
        yield rows[start], rows[stop - 1] + 1


def _overlap(a: Collective, b: Collective) -> bool:
    return a.pool is b.pool and a.start < b.stop and b.start < a.stop


class Sharding(NamedTuple):
    """How DTensors lie on the ranks, by their id, and where units that are split are added up.

    ``split`` says it of all parameters; ``ranks`` are the process groups that share any of them.
    """

    kinds: dict[int, Kind]
    split: list[bool]
    ranks: list[Any]
    exchange: Exchange | None


NOTHING = Sharding({}, [], [], None)


def sharding_of(work: Work) -> Sharding:
    """How the DTensors of these groups lie, told without communication."""
    kinds: dict[int, Kind] = {}
    split: list[tuple[Tensor, UnitDim]] = []
    for group in work.groups:
        for param in filter(is_sharded, group["params"]):
            kinds[id(param)] = kind = work.kind_of(param, group)
            if kind is Kind.SPLIT:
                split.append((param, group["unit_dim"]))
    params = [param for group in work.groups for param in group["params"]]
    mask = [kinds.get(id(param)) is Kind.SPLIT for param in params]
    return Sharding(kinds, mask, mesh_groups(params), Exchange(split) if split else None)


class CachedSharding:
    """That of a step, while it has the same parameters."""

    def __init__(self) -> None:
        self._cached: Cached[Sharding] = Cached()

    def of(self, work: Work) -> Sharding:
        """What there is to know; nothing where there is no DTensor."""
        params = list(chain.from_iterable([group["params"] for group in work.groups]))
        if not any_sharded(params):
            return NOTHING
        return self._cached.get(partial(self._look, work, params), partial(sharding_of, work))

    def _look(self, work: Work, params: list[Tensor], sharding: Sharding) -> Look:
        options = [
            (len(g["params"]), g["unit_dim"], work.sums_units(g), bool(g.get("differentiable")))
            for g in work.groups
        ]
        # Their memory may move between devices.
        devices = [here.device for here in locals_of(compress(params, sharding.split))]
        return Look((options, devices, list(map(id, params))), [], [], [])
