"""Unit classes of the kernels: every tile shape and boundary, alignment, layouts and dtypes.

Every tensor lies between guard bands, and scratch memory is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import agc_triton.triton_path.buckets
from agc_triton import adaptive_clip_grad_
from agc_triton.kernels import abi
from agc_triton.triton_path.buckets import TensorUnits, ideal_shape
from agc_triton.units import UnitLayout
from tests.support.cases import STATEFUL, build
from tests.support.triton_cases import (
    CLIPPING,
    DEVICE,
    TRITON,
    Guarded,
    GuardedRun,
    KernelOracle,
    bound_args,
    bucket_plans,
    check_clipped,
    make_grad,
    make_weight,
    plan_of,
    states_of,
    tile_shapes,
)

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

ADAMW = {"lr": 0.5, "weight_decay": 0.1}
SGD = {"lr": 0.5, "weight_decay": 0.1}


@pytest.fixture
def unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor keeps the tile shape that suits it best."""
    monkeypatch.setattr(agc_triton.triton_path.buckets, "LAUNCH_ELEMENTS", -float("inf"))
    monkeypatch.setattr(agc_triton.triton_path.buckets, "MAX_BUCKETS", 1000)


def units(length: int, aligned: bool = True, outer: int = 1) -> TensorUnits:
    return TensorUnits(UnitLayout(1, outer, 2, length // outer), aligned, 0)


def boundaries(dtype: torch.dtype, states: int) -> list[int]:
    """Each greatest length of a unit that a tile shape holds."""
    lengths, shape = [], ideal_shape(units(1, False), dtype.itemsize, states)
    while not shape.split:
        length = shape.capacity
        lengths.append(length)
        shape = ideal_shape(units(length + 1, False), dtype.itemsize, states)
    return lengths


def around(dtype: torch.dtype, states: int) -> list[Any]:
    return [
        pytest.param(dtype, length, id=f"{str(dtype).removeprefix('torch.')}, {length}")
        for length in boundaries(dtype, states)
    ]


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        *around(torch.float32, 2),
        *around(torch.bfloat16, 2),
        *around(torch.float16, 2),
        *around(torch.float64, 2),
    ],
)
def test_both_sides_of_every_boundary(dtype: torch.dtype, length: int) -> None:
    shapes = [(1, length - 1), (1, length), (2, length + 1)]
    weights = [make_weight(shape, seed=i) for i, shape in enumerate(shapes)]
    run = GuardedRun("SGD", weights, STATEFUL["SGD"], dtype)
    run.step()
    expected = [ideal_shape(units(n), dtype.itemsize, 2) for _, n in shapes]
    assert tile_shapes(run.optimizer) == set(expected)
    assert expected[1] != expected[2]


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("length", [n for n in boundaries(torch.float32, 3) if n >= 128])
def test_boundaries_with_three_states(length: int) -> None:
    lengths = (length, length + 1)
    weights = [make_weight((2, n), seed=n) for n in lengths]
    run = GuardedRun("RMSprop", weights, STATEFUL["RMSprop"])
    run.step()
    expected = {ideal_shape(units(n), 4, 3) for n in lengths}
    assert tile_shapes(run.optimizer) == expected
    assert len(expected) == 2


LENGTHS = (3, 128, 129, 644, 20480, 20481)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize(("name", "options"), [("SGD", SGD), ("AdamW", ADAMW)])
def test_no_state_and_two_states(name: str, options: dict[str, Any]) -> None:
    run = GuardedRun(name, [make_weight((2, n), seed=n) for n in LENGTHS], options)
    run.step()
    assert tile_shapes(run.optimizer) == {ideal_shape(units(n), 4, 2) for n in LENGTHS}


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_alone(dtype: torch.dtype) -> None:
    weights = [make_weight((2, n), seed=n).to(dtype) for n in LENGTHS]
    grads = [make_grad((2, n), seed=n).to(dtype) for n in LENGTHS]
    params, guarded = [Guarded(w) for w in weights], [Guarded(g) for g in grads]
    for p, g in zip(params, guarded, strict=True):
        p.tensor.grad = g.tensor
    adaptive_clip_grad_([p.tensor for p in params], CLIPPING, backend="triton")
    for p, g, weight, grad in zip(params, guarded, weights, grads, strict=True):
        p.assert_intact()
        g.assert_intact()
        assert torch.equal(p.tensor.cpu(), weight)
        assert p.tensor.grad is g.tensor
        check_clipped(weight, grad, g.tensor)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("role", ["param", "grad", "state"])
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, 2), (torch.bfloat16, 1)],
    ids=str,
)
def test_one_unaligned_address_is_enough(dtype: torch.dtype, offset: int, role: str) -> None:
    lengths = (96, 1024, 20496)
    weights = [make_weight((2, n), seed=n) for n in lengths]
    run = GuardedRun("SGD", weights, STATEFUL["SGD"], dtype, {role: offset})
    run.step()
    assert {shape.vector for shape in tile_shapes(run.optimizer)} == {1}


@pytest.mark.usefixtures("unmerged")
def test_a_multiple_of_16_bytes_is_aligned() -> None:
    weights = [make_weight((2, n), seed=n) for n in (96, 1024, 20496)]
    run = GuardedRun("SGD", weights, STATEFUL["SGD"], offsets={"param": 4, "grad": 8, "state": 12})
    run.step()
    assert {shape.vector for shape in tile_shapes(run.optimizer)} == {4}


# Of ConvTranspose weights, (in, out / groups, ...), and of shapes on both sides of boundaries.
TRANSPOSED = (
    *((5, 3), (7, 3, 2, 2), (43, 2, 3, 3), (2277, 2, 3, 3)),
    *((length, 2) for n in (128, 640, 20480) for length in (n, n + 1)),
)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("shape", TRANSPOSED, ids=str)
def test_strided_units(shape: tuple[int, ...]) -> None:
    options = {**ADAMW, "unit_dim": 1}
    run = GuardedRun("AdamW", [make_weight(shape, 1)], options)
    run.step()
    (tile,) = tile_shapes(run.optimizer)
    length = shape[0] * (shape[2] * shape[3] if len(shape) == 4 else 1)
    assert tile == ideal_shape(units(length, outer=shape[0]), 4, 2)
    assert tile.strided
    assert tile.split == (length > 20480)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_strided_units_of_other_dtypes(dtype: torch.dtype) -> None:
    shapes = ((7, 3, 2, 2), (43, 2, 3, 3), (16400, 2))
    options = {**STATEFUL["SGD"], "unit_dim": 1}
    run = GuardedRun("SGD", [make_weight(s, 1) for s in shapes], options, dtype)
    run.step()
    assert {(tile.strided, tile.split) for tile in tile_shapes(run.optimizer)} == {
        (True, False),
        (True, True),
    }


@pytest.mark.parametrize("shape", [(), (1,), (300,), (300, 1, 1, 1), (1, 5), (30_000,)], ids=str)
def test_a_whole_tensor_as_one_unit(shape: tuple[int, ...]) -> None:
    run = GuardedRun("SGD", [make_weight(shape, 1)], {**STATEFUL["SGD"], "unit_dim": 1})
    run.step()
    (bucket,) = bucket_plans(run.optimizer)[0].buckets
    assert bucket.units == 1


def test_one_long_unit() -> None:
    # A vision transformer's position embedding.
    run = GuardedRun("SGD", [make_weight((1, 197, 1024))], SGD)
    run.step()
    (plan,) = bucket_plans(run.optimizer)
    assert plan.sums == 25


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_parts_longer_than_a_tile(
    dtype: torch.dtype, unit_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agc_triton.triton_path.buckets, "MAX_PARTS", 2)
    shape = (2, 40_001) if unit_dim == 0 else (40_001, 2)
    options = {**SGD, "unit_dim": unit_dim}
    run = GuardedRun("SGD", [make_weight(shape, unit_dim)], options, dtype)
    run.step()
    (plan,) = bucket_plans(run.optimizer)
    (bucket,) = plan.buckets
    assert len(plan.parts) == plan.sums == 2 * 2
    assert len(bucket.tiles) > len(plan.parts)


MIXTURE = ((4, 24), (3, 27), (5,), (2, 700), (2, 1030), (2, 20501))


@pytest.mark.parametrize("buckets", [1, 4])
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_merged_classes(unit_dim: int, buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agc_triton.triton_path.buckets, "MAX_BUCKETS", buckets)
    weights = [make_weight(shape if unit_dim == 0 else shape[::-1], unit_dim) for shape in MIXTURE]
    run = GuardedRun("SGD", weights, {**STATEFUL["SGD"], "unit_dim": unit_dim})
    run.step()
    assert len(bucket_plans(run.optimizer)[0].buckets) <= buckets


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}
GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "expanded": lambda t: t[:, :, :1].expand(t.shape),
    "with gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("unit_dim", [None, 1, 2, -1])
@pytest.mark.parametrize("layout", [None, *GRADS])
def test_any_dense_layout(layout: str | None, unit_dim: int | None) -> None:
    shape = (4, 3, 2, 5)
    weights = [relaid(make_weight(shape, unit_dim)) for relaid in LAYOUTS.values()]
    run = GuardedRun("SGD", weights, {**STATEFUL["SGD"], "unit_dim": unit_dim})
    grads = None
    if layout is not None:
        values = [make_grad(shape, unit_dim, i).float().to(DEVICE) for i in range(len(weights))]
        grads = [GRADS[layout](value) for value in values]
    run.step(grads=grads)


def test_states_laid_out_unlike_their_parameter() -> None:
    weight = LAYOUTS["channels_last"](make_weight((4, 3, 2, 5)))
    run = GuardedRun("AdamW", [weight], ADAMW)
    (param,) = run.params
    entry = run.optimizer.state[param]
    loaded = Guarded(entry["exp_avg"].contiguous())
    entry["exp_avg"] = loaded.tensor
    run.step()
    assert entry["exp_avg"].stride() == param.stride()
    loaded.assert_intact()


def test_all_dtypes_in_one_optimizer() -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = {d: [make_weight((3, 20), seed=i).to(d).to(DEVICE) for i in range(2)] for d in kinds}
    params |= {
        d: [torch.complex(*(make_weight((3, 20), seed=i).to(d.to_real()) for i in range(2)))]
        for d in (torch.complex64, torch.complex128)
    }
    params = {dtype: [p.to(DEVICE) for p in list_] for dtype, list_ in params.items()}
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, **TRITON}
    optimizer = build("SGD", [p for list_ in params.values() for p in list_], options)
    oracles = {dtype: KernelOracle("SGD", list_, **options) for dtype, list_ in params.items()}
    for seed in range(2):
        for dtype, list_ in params.items():
            for i, p in enumerate(list_):
                grads = [make_grad(p.shape, seed=10 * seed + i + k) for k in range(2)]
                values = torch.complex(*grads) if dtype.is_complex else grads[0]
                p.grad = values.to(dtype).to(DEVICE)
            oracles[dtype].load(list_, states_of(optimizer, list_))
            oracles[dtype].step([p.grad for p in list_])
        optimizer.step()
        for dtype, list_ in params.items():
            oracles[dtype].check(list_, states_of(optimizer, list_))
    assert len(plan_of(optimizer).parts) == len(params)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_offsets_beyond_32_bits(unit_dim: int) -> None:
    shapes = ((3, 20), (2, 700), (2, 20_484)) if unit_dim == 0 else ((7, 3, 2, 2), (20_484, 2))
    run = GuardedRun(
        "SGD",
        [make_weight(shape, unit_dim) for shape in shapes],
        {**STATEFUL["SGD"], "unit_dim": unit_dim},
    )
    grads = [make_grad(shape, unit_dim).float().to(DEVICE) for shape in shapes]
    run.step(grads=grads)
    # As if each tensor began 24 GiB before where it is, and were stepped from there on.
    far = 3 << 31
    (part,) = plan_of(run.optimizer).parts
    launcher, tables = part.launches.launcher, part.launches.tables
    for launch in (launcher.opening, *launcher.steps):
        bound_args(launch)["tiles_ptr"][:, 1] += far
    addresses = tables.addresses
    for role in {*range(tables.roles)} - {abi.SCALARS}:  # a count has no offset
        addresses.view(tables.roles, -1)[role] -= far * 4
    altered = addresses.clone()
    for grad in grads:
        grad.mul_(-0.5)
    run.step(grads=grads)
    assert torch.equal(addresses, altered)
