"""The tile shape that the planner finds ideal for a unit."""

from __future__ import annotations

import pytest

from agc_triton.triton_path import buckets
from agc_triton.triton_path.buckets import TensorUnits, TileShape, ideal_shape
from agc_triton.units import UnitLayout


def rows(length: int, units: int = 2, aligned: bool = True, group: int = 0) -> TensorUnits:
    return TensorUnits(UnitLayout(1, 1, units, length), aligned, group)


def strided(outer: int, inner: int, units: int = 2) -> TensorUnits:
    return TensorUnits(UnitLayout(1, outer, units, inner), True, 0)


# Warps and chunks of 128 elements a warp: the fewest warps with at most five that do not spill.
FP32 = {
    **{512: (1, 4), 640: (1, 5), 768: (2, 3), 1152: (2, 5), 1536: (4, 3), 2304: (4, 5)},
    **{3072: (8, 3), 4096: (16, 2), 4608: (8, 5), 8192: (16, 4), 11008: (32, 3), 14336: (32, 4)},
    **{20480: (32, 5)},
}


@pytest.mark.parametrize(("length", "expected"), FP32.items())
def test_whole_units_in_registers(length: int, expected: tuple[int, int]) -> None:
    warps, chunks = expected
    shape = ideal_shape(rows(length), 4, 2)
    assert shape == TileShape(1, 128 * warps, chunks, warps, 4, False, False)


# With three states at most three, and 32 warps instead of 16 warps of three.
FP32_3_STATES = {
    **{384: (1, 3), 512: (2, 2), 768: (2, 3), 1536: (4, 3), 3072: (8, 3), 4096: (16, 2)},
    **{4608: (32, 2), 6144: (32, 2), 8192: (32, 2), 12288: (32, 3)},
}


@pytest.mark.parametrize(("length", "expected"), FP32_3_STATES.items())
def test_whole_units_in_registers_beside_three_states(
    length: int, expected: tuple[int, int]
) -> None:
    warps, chunks = expected
    shape = ideal_shape(rows(length), 4, 3)
    assert shape == TileShape(1, 128 * warps, chunks, warps, 4, False, False)


@pytest.mark.parametrize(("itemsize", "chunks"), [(2, 2), (4, 4), (8, 4)])
def test_tiles_of_longer_units(itemsize: int, chunks: int) -> None:
    wide = 16 // itemsize
    shape = ideal_shape(rows(1 << 20), itemsize, 2)
    assert shape == TileShape(1, 512 * wide, chunks, 16, wide, False, True)


def test_units_of_at_most_one_access_per_warp_share_a_program() -> None:
    assert ideal_shape(rows(128), 4, 2) == TileShape(4, 128, 1, 4, 4, False, False)
    assert ideal_shape(rows(132), 4, 2) == TileShape(1, 128, 2, 1, 4, False, False)


@pytest.mark.parametrize("states", [0, 1, 2, 3])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_the_smallest_shape_that_holds_a_unit(itemsize: int, states: int) -> None:
    table = buckets.MAX_CHUNKS_3_STATES if states > 2 else buckets.MAX_CHUNKS
    before = 0
    for length in range(1, 25_000):
        shape = ideal_shape(rows(length), itemsize, states)
        assert not shape.strided
        assert shape.vector == (16 // itemsize if length * itemsize % 16 == 0 else 1)
        if shape.split:
            break
        # A warp reads 512 bytes at a time.
        assert shape.rows * shape.columns * itemsize == 512 * (
            4 if shape.rows > 1 else shape.num_warps
        )
        assert length <= shape.capacity < max(2 * length, 2 * 16 // itemsize)
        assert shape.chunks <= table[itemsize]
        assert shape.capacity >= before
        before = shape.capacity
    most = 2 if (itemsize, states) == (2, 2) else table[itemsize]  # with all warps
    assert length == 512 * buckets.MAX_WARPS * most // itemsize + 1


# Two states in 16 bits: a third chunk where two of twice the warps would be emptier by a third.
BF16 = {576: (1, 3), 768: (2, 2), 1152: (2, 3), 1536: (4, 2), 2304: (4, 3), 4608: (8, 3)}


@pytest.mark.parametrize(("length", "expected"), BF16.items())
def test_a_third_chunk_in_16_bits(length: int, expected: tuple[int, int]) -> None:
    warps, chunks = expected
    assert ideal_shape(rows(length), 2, 2) == TileShape(
        1, 256 * warps, chunks, warps, 8, False, False
    )
    one_state = ideal_shape(rows(length), 2, 1)
    assert (one_state.num_warps, one_state.chunks) == (warps if chunks == 3 else warps // 2, 3)


def test_alignment_and_strides_decide_the_width_of_accesses() -> None:
    assert ideal_shape(rows(1024), 4, 2).vector == 4
    assert ideal_shape(rows(1024, aligned=False), 4, 2).vector == 1
    assert ideal_shape(rows(1026), 4, 2).vector == 1
    assert ideal_shape(rows(1024), 2, 2).vector == 8
    assert ideal_shape(rows(1028), 2, 2).vector == 1
    shape = ideal_shape(strided(256, 4), 4, 2)
    assert (shape.vector, shape.strided) == (1, True)
