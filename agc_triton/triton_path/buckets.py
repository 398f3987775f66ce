"""Planning: tensors -> buckets of tiles, one kernel launch each. Numbers only, nothing is run here.

A unit is a row of a flattened index space over many tensors. A bucket is a tile shape (what one
program of the kernel handles) and the table of its tiles; few buckets mean few launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from agc_triton.kernels import abi
from agc_triton.triton_path.tiles import (
    NO_FOLDS,
    NO_TILES,
    Table,
    fields_of,
    split_tiles,
    sum_tables,
    whole_tiles,
)
from agc_triton.units import UnitLayout

# Launches that update parameters, per step; `begin` and a copy of the tables come before them.
MAX_BUCKETS = 4
# The same for units that are split between ranks; `fold` comes before them.
MAX_BUCKETS_ACROSS = 2

# Elements of a unit that is split between ranks which one program sums; more are several parts.
ACROSS_SPAN = 1 << 16

# What one more launch costs, in elements: ~3 us at ~3 TB/s and 28 bytes per element.
LAUNCH_ELEMENTS = 300_000

# Chunks of p and g that fit in 64 registers a thread beside the update (benchmarks/kernel_report).
MAX_CHUNKS = {2: 3, 4: 5, 8: 4}
# The same with three states (amsgrad; centered with momentum).
MAX_CHUNKS_3_STATES = {2: 1, 4: 3, 8: 3}
# Bytes per element, warps and chunks that spill all the same, and take twice the warps instead.
SPILLING = {(2, 16, 3), (4, 8, 4)}
SPILLING_3_STATES = {(4, 16, 3)}

MAX_WARPS = 32
SPLIT_WARPS = 16
# By bytes per element: 4 chunks of 16-bit elements spill up to 176 bytes.
SPLIT_CHUNKS = {2: 2, 4: 4, 8: 4}


class TensorUnits(NamedTuple):
    """What planning needs to know of one tensor.

    ``layout`` counts real elements (a complex one is two); ``aligned`` says that as many elements
    of every role as are 16 bytes of the parameter can be read in one access. ``pair`` is the place
    of its first unit's sums in an exchange between ranks, None where its units are whole.
    """

    layout: UnitLayout
    aligned: bool
    group: int
    pair: int | None = None


@dataclass(frozen=True)
class TileShape:
    """The compile-time shape of one launch.

    A program holds ``rows`` units of up to ``chunks * columns`` elements in registers, or, if
    ``split``, that many elements of one longer unit. ``vector`` elements are read per access.
    ``across`` where the units are split between ranks, whose sums are known beforehand.
    """

    rows: int
    columns: int
    chunks: int
    num_warps: int
    vector: int
    strided: bool
    split: bool
    across: bool = False

    @property
    def summed(self) -> bool:
        """Whether `begin` sums its units."""
        return self.split or self.across

    @property
    def capacity(self) -> int:
        """Elements of one unit that a program holds."""
        return self.chunks * self.columns


@dataclass(frozen=True)
class Bucket:
    """One launch: a tile shape and its table of tiles (see kernels/abi.py for the fields)."""

    shape: TileShape
    tensors: tuple[int, ...]
    units: int
    elements: int
    tiles: Table

    def bytes_moved(self, itemsize: int, grad_itemsize: int, states: int) -> int:
        """Bytes per step: p, g and states read, p and states written; p and g twice if summed."""
        twice = int(self.shape.summed)
        accesses = (1 + states) + (1 + states) + twice
        return self.elements * (accesses * itemsize + (1 + twice) * grad_itemsize)


@dataclass(frozen=True)
class BucketPlan:
    """All launches of one step over tensors of one dtype, flags and device.

    ``fields`` has one row per tensor; ``parts`` one row per program that sums a part of a unit,
    whose results go to ``sums`` pairs of partial sums, or to an exchange between ranks; ``folds``
    one row per unit that is split between ranks and has several parts here.
    """

    buckets: tuple[Bucket, ...]
    fields: Table
    parts: Table
    folds: Table
    sums: int

    @property
    def parts_vector(self) -> int:
        """Elements per access when parts are summed: what all those buckets can do."""
        return min((b.shape.vector for b in self.buckets if b.shape.summed), default=1)

    @property
    def parts_strided(self) -> bool:
        """Whether any part belongs to a strided unit."""
        return any(b.shape.strided for b in self.buckets if b.shape.summed)


def plan_buckets(tensors: Sequence[TensorUnits], itemsize: int, states: int) -> BucketPlan:
    """Assign every tensor to one of at most `MAX_BUCKETS` buckets and lay out the tiles.

    Units that are split between ranks have buckets of their own, the last.

    Args:
        tensors: in the order of the address tables; none is empty.
        itemsize: bytes per real element of a parameter (2, 4 or 8).
        states: state tensors per parameter.
    """
    chosen = _choose(tensors, itemsize, states)
    split_span = _split_shape(itemsize, True, False).capacity
    unit_of = np.cumsum([0, *(t.layout.n_units for t in tensors)]).tolist()
    spans = [split_span if t.pair is None else max(split_span, ACROSS_SPAN) for t in tensors]
    given = zip(tensors, spans, strict=True)
    fields = np.array([fields_of(t.layout, t.group, span) for t, span in given], np.int64)
    fields = fields.reshape(-1, abi.TENSOR_FIELDS)
    buckets = []
    parts, folds = [NO_TILES], [NO_FOLDS]
    sums = 0
    for shape, members in chosen:
        tiles = []
        for i in members:
            layout, pair, unit = tensors[i].layout, tensors[i].pair, unit_of[i]
            if shape.split:
                tiles.append(split_tiles(i, layout, shape.capacity, unit))
            else:
                tiles.append(whole_tiles(i, layout, shape.rows, unit))
            if shape.summed:
                summed = sum_tables(i, layout, pair, int(fields[i, 4]), sums)
                parts.append(summed.parts)
                folds.append(summed.folds)
                sums += summed.sums
                tiles[-1][:, 4] = summed.pairs[tiles[-1][:, 3] - unit]
        layouts = [tensors[i].layout for i in members]
        units = sum(layout.n_units for layout in layouts)
        elements = sum(layout.n_units * layout.length for layout in layouts)
        buckets.append(Bucket(shape, tuple(members), units, elements, np.concatenate(tiles)))
    return BucketPlan(tuple(buckets), fields, np.concatenate(parts), np.concatenate(folds), sums)


def _choose(
    tensors: Sequence[TensorUnits], itemsize: int, states: int
) -> list[tuple[TileShape, list[int]]]:
    """Tile shapes and the tensors in each; what is split between ranks comes last."""
    found = []
    for across, limit in ((False, MAX_BUCKETS), (True, MAX_BUCKETS_ACROSS)):
        chosen: dict[TileShape, list[int]] = {}
        for i, tensor in enumerate(tensors):
            if (tensor.pair is not None) is across:
                chosen.setdefault(ideal_shape(tensor, itemsize, states), []).append(i)
        merged = _merge(chosen, tensors, limit)
        found += sorted(merged.items(), key=lambda item: item[0].capacity)
    return found


def ideal_shape(tensor: TensorUnits, itemsize: int, states: int) -> TileShape:
    """The tile shape that suits a tensor best, were launches free.

    Registers hold a whole unit: the fewest warps whose chunks of 16 bytes per thread number at
    most `MAX_CHUNKS`; shorter units go several to a program, longer ones are split.
    """
    layout, wide, across = tensor.layout, 16 // itemsize, tensor.pair is not None
    strided = layout.outer > 1
    length = layout.length
    aligned = tensor.aligned and not strided and length % wide == 0
    vector = wide if aligned else 1
    if length <= 32 * wide:
        columns = 1 << max(length - 1, wide - 1).bit_length()
        return TileShape(128 * wide // columns, columns, 1, 4, vector, strided, False, across)
    warps = 1
    while warps <= MAX_WARPS:
        columns = 32 * wide * warps
        chunks = -(-length // columns)
        if _in_registers(length, columns, itemsize, warps, states):
            return TileShape(1, columns, chunks, warps, vector, strided, False, across)
        warps *= 2
    return _split_shape(itemsize, aligned, strided, across)


def _in_registers(length: int, columns: int, itemsize: int, warps: int, states: int) -> bool:
    """Whether a unit's chunks of so many columns fit beside the update."""
    chunks = -(-length // columns)
    if states > 2:
        fits = chunks <= MAX_CHUNKS_3_STATES[itemsize]
        return fits and (itemsize, warps, chunks) not in SPILLING_3_STATES
    if (itemsize, states, chunks) == (2, 2, 3):
        # It spills 24 to 64 bytes, which pays only where two chunks of twice the warps would leave
        # more than a third of themselves empty (H200: ResNet-50 121 -> 112 us, but F0 267 -> 273).
        return warps < MAX_WARPS and length < 8 / 3 * columns
    return chunks <= MAX_CHUNKS[itemsize] and (itemsize, warps, chunks) not in SPILLING


def _split_shape(itemsize: int, aligned: bool, strided: bool, across: bool = False) -> TileShape:
    wide = 16 // itemsize
    columns, chunks = 32 * wide * SPLIT_WARPS, SPLIT_CHUNKS[itemsize]
    vector = wide if aligned else 1
    return TileShape(1, columns, chunks, SPLIT_WARPS, vector, strided, True, across)


def _hosts(host: TileShape, shape: TileShape) -> bool:
    """Whether tensors whose ideal is ``shape`` can go in a bucket of shape ``host``."""
    fits = host.split or (not shape.split and shape.capacity <= host.capacity)
    return fits and host.vector <= shape.vector and host.strided >= shape.strided


def _cost(host: TileShape, members: list[int], tensors: Sequence[TensorUnits]) -> float:
    """What these tensors cost in a bucket of shape ``host``, in elements moved at full speed."""
    cost = 0.0
    for i in members:
        layout, aligned = tensors[i].layout, tensors[i].aligned
        per_unit = (layout.length + max(host.capacity, layout.length)) / 2
        # Narrow accesses and a second reading of p and g, in proportion to the bytes of a step.
        penalty = (2.0 if host.vector == 1 and aligned else 1.0) + (8 / 28 if host.split else 0.0)
        cost += layout.n_units * per_unit * penalty
    return cost


def _merge(
    chosen: dict[TileShape, list[int]], tensors: Sequence[TensorUnits], limit: int
) -> dict[TileShape, list[int]]:
    """Move whole buckets into others while that saves time or there are too many of them."""
    chosen = {shape: list(members) for shape, members in chosen.items()}
    costs = {shape: _cost(shape, members, tensors) for shape, members in chosen.items()}
    while len(chosen) > 1:
        moves = [
            (_cost(host, chosen[shape], tensors) - costs[shape], at, to, shape, host)
            for at, shape in enumerate(chosen)
            for to, host in enumerate(chosen)
            if host != shape and _hosts(host, shape)
        ]
        if not moves:  # one bucket each for aligned, unaligned and strided units at the most
            break
        extra, _, _, shape, host = min(moves, key=lambda move: move[:3])
        if extra > LAUNCH_ELEMENTS and len(chosen) <= limit:
            break
        chosen.setdefault(host, []).extend(chosen.pop(shape))
        costs[host] = _cost(host, chosen[host], tensors)
    return {shape: sorted(members) for shape, members in chosen.items()}
