"""The planner alone: which tile shapes it chooses, and that its tiles cover every element once."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agc_triton.triton_path import buckets, tiles
from agc_triton.triton_path.buckets import (
    BucketPlan,
    TensorUnits,
    TileShape,
    plan_buckets,
)
from agc_triton.units import UnitLayout, unit_layout
from benchmarks.lib.workloads import TABLES, load_shapes

Indices = npt.NDArray[np.int64]


def rows(length: int, units: int = 2, aligned: bool = True, group: int = 0) -> TensorUnits:
    return TensorUnits(UnitLayout(1, 1, units, length), aligned, group)


def contiguous_layout(shape: Sequence[int]) -> UnitLayout:
    layout = unit_layout(torch.Size(shape), tuple(range(len(shape))), None)
    assert layout is not None
    return layout


def tile_elements(plan: BucketPlan) -> Iterator[tuple[TileShape, int, list[Indices]]]:
    """Per tile: its shape, its tensor, and where the elements of each of its units lie."""
    for bucket in plan.buckets:
        shape = bucket.shape
        for tensor, offset, third, *_ in bucket.tiles.tolist():
            length, inner, stride = plan.fields[tensor, :3].tolist()
            start, count = (third, 1) if shape.split else (0, third)
            columns = np.arange(start, start + min(length - start, shape.capacity))
            if shape.strided:
                at, step = columns // inner * stride + columns % inner, inner
            else:
                at, step = columns, length
            assert count <= shape.rows
            yield shape, tensor, [offset + r * step + at for r in range(count)]


def assert_covers(plan: BucketPlan, tensors: Sequence[TensorUnits]) -> None:
    """Every element of every tensor lies in one tile, and tile rows hold whole units."""
    seen = [np.zeros(math.prod(t.layout), np.int64) for t in tensors]
    for shape, tensor, units in tile_elements(plan):
        _, outer, count, inner = tensors[tensor].layout
        for elements in units:
            np.add.at(seen[tensor], elements, 1)
            batch = elements // (outer * count * inner)
            assert len(set((batch * count + elements // inner % count).tolist())) == 1
            if not shape.split:
                assert len(elements) == outer * inner
    for times in seen:
        assert np.all(times == 1)


def unit_numbers(tensors: Sequence[TensorUnits]) -> dict[tuple[int, int], int]:
    """The number of each unit, by its tensor and where it begins."""
    numbers: dict[tuple[int, int], int] = {}
    for i, tensor in enumerate(tensors):
        batch, outer, units, inner = tensor.layout
        for b, u in product(range(batch), range(units)):
            numbers[i, b * outer * units * inner + u * inner] = len(numbers)
    return numbers


def assert_numbers_units(plan: BucketPlan, tensors: Sequence[TensorUnits]) -> None:
    """A tile knows its first unit's number, and the next units' follow."""
    numbers = unit_numbers(tensors)
    for bucket in plan.buckets:
        for tensor, offset, third, unit, _ in bucket.tiles.tolist():
            inner = tensors[tensor].layout.inner
            for row in range(1 if bucket.shape.split else third):
                assert numbers[tensor, offset + row * inner] == unit + row


def assert_sums_parts(plan: BucketPlan, tensors: Sequence[TensorUnits]) -> None:
    """Parts cover long and divided units once; sums end where the tiles look for them."""
    numbers = unit_numbers(tensors)
    ends: dict[int, int] = {}  # by unit, where its first pair or its place in the exchange is
    parts: Counter[int] = Counter()
    own = [at for *_, there, at in plan.parts.tolist() if not there]
    assert sorted(own) == list(range(plan.sums))
    for tensor, offset, start, there, at in plan.parts.tolist():
        span, unit = int(plan.fields[tensor, 4]), numbers[tensor, offset]
        assert start % span == 0
        assert start // span < tiles.MAX_PARTS
        assert ends.setdefault(unit, at) == at - (0 if there else start // span)
        assert not there or tensors[tensor].pair is not None
        parts[unit] += 1
    added = {first: (count, place) for first, count, place in plan.folds.tolist()}
    for bucket in plan.buckets:
        for tensor, *_, unit, at in bucket.tiles.tolist() if bucket.shape.summed else ():
            layout, span = tensors[tensor].layout, int(plan.fields[tensor, 4])
            assert parts[unit] == -(-layout.length // span)
            pair = tensors[tensor].pair
            if pair is None:
                assert at == ends[unit]
                continue
            first_unit = min(n for (t, _), n in numbers.items() if t == tensor)
            assert at == pair + unit - first_unit
            assert parts[unit] == 1 or added[ends[unit]] == (parts[unit], at)
            assert parts[unit] > 1 or ends[unit] == at


def assert_keeps_promises(plan: BucketPlan, tensors: Sequence[TensorUnits], itemsize: int) -> None:
    """Wide accesses only where they are aligned, contiguous accesses only where units are."""
    for bucket in plan.buckets:
        shape = bucket.shape
        assert bucket.units == sum(tensors[i].layout.n_units for i in bucket.tensors)
        assert bucket.elements == sum(math.prod(tensors[i].layout) for i in bucket.tensors)
        assert list(bucket.tensors) == sorted(set(bucket.tiles[:, 0].tolist()))
        for i in bucket.tensors:
            layout, aligned, group, pair = tensors[i]
            assert shape.across is (pair is not None)
            assert shape.strided or layout.outer == 1
            assert shape.split or layout.length <= shape.capacity
            assert plan.fields[i, 3] == group
            if shape.vector > 1:
                assert shape.vector * itemsize == 16
                assert aligned
                assert layout.outer == 1
                assert layout.length % shape.vector == 0
    split = [bucket.shape for bucket in plan.buckets if bucket.shape.summed]
    assert plan.parts_vector == min((shape.vector for shape in split), default=1)
    assert plan.parts_strided == any(shape.strided for shape in split)


EDGES = (1, 2, 4, 8, 127, 128, 129, 640, 641, 1280, 8192, 8193, 20480, 20481, 40_000)
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))
LAYOUTS = st.one_of(
    st.builds(UnitLayout, st.just(1), st.just(1), st.integers(1, 5), LENGTHS),
    st.builds(UnitLayout, st.integers(1, 3), LENGTHS, st.integers(1, 3), st.integers(1, 9)),
)
PAIRS = st.one_of(st.none(), st.integers(0, 50))
TENSORS = st.lists(
    st.builds(TensorUnits, LAYOUTS, st.booleans(), st.integers(0, 3), PAIRS), min_size=1
)


@given(
    tensors=TENSORS.filter(lambda tensors: sum(math.prod(t.layout) for t in tensors) < 500_000),
    itemsize=st.sampled_from([2, 4, 8]),
    states=st.integers(0, 3),
    launch_elements=st.sampled_from([-math.inf, buckets.LAUNCH_ELEMENTS, math.inf]),
    max_buckets=st.sampled_from([1, buckets.MAX_BUCKETS, 1000]),
    max_parts=st.sampled_from([2, tiles.MAX_PARTS]),
)
def test_every_element_is_in_one_tile(
    tensors: list[TensorUnits],
    itemsize: int,
    states: int,
    launch_elements: float,
    max_buckets: int,
    max_parts: int,
) -> None:
    with (
        mock.patch.multiple(
            buckets,
            LAUNCH_ELEMENTS=launch_elements,
            MAX_BUCKETS=max_buckets,
            ACROSS_SPAN=1 << 10,
        ),
        mock.patch.object(tiles, "MAX_PARTS", max_parts),
    ):
        plan = plan_buckets(tensors, itemsize, states)
        assert sorted(i for b in plan.buckets for i in b.tensors) == list(range(len(tensors)))
        assert_covers(plan, tensors)
        assert_numbers_units(plan, tensors)
        assert_sums_parts(plan, tensors)
        assert_keeps_promises(plan, tensors, itemsize)
        # Aligned, unaligned and strided units may need one each.
        across = [bucket.shape.across for bucket in plan.buckets]
        assert across == sorted(across)
        assert across.count(False) <= max(max_buckets, 3)
        assert across.count(True) <= max(buckets.MAX_BUCKETS_ACROSS, 3)


MODELS = sorted(path.stem for path in TABLES.glob("*.csv"))


def model_units(model: str) -> list[TensorUnits]:
    layouts = [contiguous_layout(s) for s in load_shapes(model)]
    return [TensorUnits(layout, True, i % 3) for i, layout in enumerate(layouts)]


@pytest.mark.parametrize("model", MODELS)
def test_few_launches_for_a_whole_model(model: str) -> None:
    tensors = model_units(model)
    plan = plan_buckets(tensors, 4, 2)
    assert 2 + len(plan.buckets) <= 6  # beside a copy of the tables and the kernel that begins
    total = sum(math.prod(t.layout) for t in tensors)
    assert sum(bucket.elements for bucket in plan.buckets) == total
    assert_keeps_promises(plan, tensors, 4)
    # A launch for next to nothing is one that no other bucket could have taken over.
    small = [b.shape for b in plan.buckets if b.elements < buckets.LAUNCH_ELEMENTS]
    assert all(shape.vector == 1 or shape.split for shape in small)


def test_small_classes_join_larger_ones() -> None:
    tensors = [rows(1536, 10_000), rows(768, 100), rows(64, 3), rows(7), rows(1, 1)]
    plan = plan_buckets(tensors, 4, 2)
    assert [(bucket.shape.vector, bucket.tensors) for bucket in plan.buckets] == [
        (1, (3, 4)),
        (4, (0, 1, 2)),
    ]


def test_many_elements_are_worth_a_launch() -> None:
    tensors = [rows(1536, 10_000), rows(768, 10_000)]
    assert [bucket.tensors for bucket in plan_buckets(tensors, 4, 2).buckets] == [(1,), (0,)]


def test_order_decides_nothing_but_the_table() -> None:
    tensors = model_units("dm_nfnet_f0")
    plan, again = plan_buckets(tensors, 4, 2), plan_buckets(tensors, 4, 2)
    for a, b in zip(plan.buckets, again.buckets, strict=True):
        assert (a.shape, a.tensors) == (b.shape, b.tensors)
        assert np.array_equal(a.tiles, b.tiles)
    turned = plan_buckets(tensors[::-1], 4, 2)
    assert [dataclasses.astuple(b.shape) for b in turned.buckets] == [
        dataclasses.astuple(b.shape) for b in plan.buckets
    ]


@pytest.mark.parametrize(
    "layout",
    [
        UnitLayout(1, 1, 300_000, 20_480),
        UnitLayout(1, 1, 3, 3 << 31),
        UnitLayout(1, 1 << 12, 3, 1 << 20),
    ],
    ids=["registers", "split", "strided"],
)
def test_offsets_beyond_32_bits(layout: UnitLayout) -> None:
    plan = plan_buckets([TensorUnits(layout, True, 0)], 4, 2)
    (bucket,) = plan.buckets
    _, outer, units, inner = layout
    assert bucket.tiles.dtype == plan.fields.dtype == plan.parts.dtype == np.int64
    assert bucket.elements == math.prod(layout) > 1 << 31
    assert plan.fields[0, :3].tolist() == [outer * inner, inner, units * inner]
    assert bucket.tiles[:, 1].max() == (units - 1) * inner
    if bucket.shape.split:
        last = bucket.tiles[-1]
        assert last[2] + bucket.shape.capacity >= layout.length > last[2]
        assert plan.sums == units * -(-layout.length // int(plan.fields[0, 4]))
        assert plan.sums <= units * tiles.MAX_PARTS
    else:
        assert len(bucket.tiles) == units


def test_rows_of_a_large_embedding() -> None:
    plan = plan_buckets([rows(64, 40_000_000)], 4, 2)
    (bucket,) = plan.buckets
    per_tile = bucket.shape.rows
    assert len(bucket.tiles) == 40_000_000 // per_tile
    first = 40_000_000 - per_tile
    assert bucket.tiles[-1].tolist() == [0, first * 64, per_tile, first, 0]
