"""Tables of tiles and tensors, as numbers; kernels/abi.py says what their fields are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agc_triton.kernels import abi
from agc_triton.units import UnitLayout

Table = npt.NDArray[np.int64]

# A long unit is summed in at most this many parts, which one block of every tile adds up again.
MAX_PARTS = 1024

NO_TILES = np.empty((0, abi.TILE_FIELDS), np.int64)
NO_FOLDS = np.empty((0, abi.FOLD_FIELDS), np.int64)


class SumTables(NamedTuple):
    """How the units of a tensor are summed, and where each unit's first pair of sums is then.

    ``sums`` is how many pairs of partial sums that takes.
    """

    parts: Table
    folds: Table
    pairs: Table
    sums: int


def fields_of(
    layout: UnitLayout, group: int, split_capacity: int
) -> tuple[int, int, int, int, int]:
    """A tensor's row (see kernels/abi.py)."""
    _, outer, units, inner = layout
    length = outer * inner
    span = -(-length // (MAX_PARTS * split_capacity)) * split_capacity
    return length, inner, units * inner, group, span


def _offsets(layout: UnitLayout) -> Table:
    """Where each unit begins, by its number in the tensor."""
    batch, outer, units, inner = layout
    starts = np.arange(batch, dtype=np.int64)[:, None] * (outer * units * inner)
    return (starts + np.arange(units, dtype=np.int64) * inner).reshape(-1)


def whole_tiles(i: int, layout: UnitLayout, rows: int, first_unit: int) -> Table:
    """Tiles of up to ``rows`` units, which lie at equal distances."""
    first = np.arange(0, layout.units, rows, dtype=np.int64)
    unit = (np.arange(layout.batch, dtype=np.int64)[:, None] * layout.units + first).reshape(-1)
    tiles = np.zeros((len(unit), abi.TILE_FIELDS), np.int64)
    tiles[:, 0] = i
    tiles[:, 1] = _offsets(layout)[unit]
    tiles[:, 2] = np.tile(np.minimum(rows, layout.units - first), layout.batch)
    tiles[:, 3] = first_unit + unit
    return tiles


def split_tiles(i: int, layout: UnitLayout, width: int, first_unit: int) -> Table:
    """Tiles of ``width`` columns of one unit, without where their sums lie."""
    starts = np.arange(0, layout.length, width, dtype=np.int64)
    unit = np.repeat(np.arange(layout.n_units, dtype=np.int64), len(starts))
    tiles = np.zeros((len(unit), abi.TILE_FIELDS), np.int64)
    tiles[:, 0] = i
    tiles[:, 1] = _offsets(layout)[unit]
    tiles[:, 2] = np.tile(starts, layout.n_units)
    tiles[:, 3] = first_unit + unit
    return tiles


def sum_tables(i: int, layout: UnitLayout, pair: int | None, span: int, sums: int) -> SumTables:
    """Parts of ``span`` columns each, whose sums follow after ``sums`` others.

    ``pair`` is the first unit's place in an exchange between ranks, if these share the units: what
    is in one part goes straight there, and several are added up before.
    """
    parts = split_tiles(i, layout, span, 0)
    per_unit = -(-layout.length // span)
    pairs = sums + np.arange(layout.n_units, dtype=np.int64) * per_unit
    parts[:, 3], parts[:, 4] = 0, sums + np.arange(len(parts))
    if pair is None:
        return SumTables(parts, NO_FOLDS, pairs, len(parts))
    places = np.arange(pair, pair + layout.n_units, dtype=np.int64)
    if per_unit == 1:
        parts[:, 3], parts[:, 4] = 1, places
        return SumTables(parts, NO_FOLDS, places, 0)
    folds = np.stack([pairs, np.full_like(pairs, per_unit), places], 1)
    return SumTables(parts, folds, places, len(parts))
