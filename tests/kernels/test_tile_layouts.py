"""Memory layouts, strided units, dtypes and offsets in the kernels, between guard bands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agc_triton.kernels import abi
from agc_triton.triton_path.buckets import ideal_shape
from tests.support.checks import oracle_for, states_of
from tests.support.guards import Guarded, GuardedRun
from tests.support.optimizers import ADAMW, STATEFUL, TRITON, build
from tests.support.places import DEVICE, KERNELS
from tests.support.plans import bound_args, plan_of, tile_shapes, units_of
from tests.support.tensors import assign, grads_like, weight, weights

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

SGD = {"lr": 0.5, "weight_decay": 0.1}


# Of ConvTranspose weights, (in, out / groups, ...), and of shapes on both sides of boundaries.
TRANSPOSED = (
    *((5, 3), (7, 3, 2, 2), (43, 2, 3, 3), (2277, 2, 3, 3)),
    *((length, 2) for n in (128, 640, 20480) for length in (n, n + 1)),
)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("shape", TRANSPOSED, ids=str)
def test_strided_units(shape: tuple[int, ...]) -> None:
    options = {**ADAMW, "unit_dim": 1}
    run = GuardedRun("AdamW", [weight(shape, device=DEVICE, unit_dim=1)], options)
    run.step()
    (tile,) = tile_shapes(run.optimizer)
    length = shape[0] * (shape[2] * shape[3] if len(shape) == 4 else 1)
    assert tile == ideal_shape(units_of(length, outer=shape[0]), 4, 2)
    assert tile.strided
    assert tile.split == (length > 20480)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_strided_units_of_other_dtypes(dtype: torch.dtype) -> None:
    shapes = ((7, 3, 2, 2), (43, 2, 3, 3), (24_600, 2))
    options = {**STATEFUL["SGD"], "unit_dim": 1}
    run = GuardedRun("SGD", weights(shapes, dtype, DEVICE, unit_dim=1), options)
    run.step()
    assert {(tile.strided, tile.split) for tile in tile_shapes(run.optimizer)} == {
        (True, False),
        (True, True),
    }


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
    params = [
        relaid(weight(shape, device=DEVICE, unit_dim=unit_dim)) for relaid in LAYOUTS.values()
    ]
    run = GuardedRun("SGD", params, {**STATEFUL["SGD"], "unit_dim": unit_dim})
    if layout is None:
        run.step()
    else:
        values = grads_like([p.contiguous() for p in run.params], unit_dim=unit_dim)
        run.step([GRADS[layout](value) for value in values])


def test_states_laid_out_unlike_their_parameter() -> None:
    run = GuardedRun(
        "AdamW", [LAYOUTS["channels_last"](weight((4, 3, 2, 5), device=DEVICE))], ADAMW
    )
    (param,) = run.params
    entry = run.optimizer.state[param]
    loaded = Guarded(entry["exp_avg"].contiguous())
    entry["exp_avg"] = loaded.tensor
    run.step()
    assert entry["exp_avg"].stride() == param.stride()
    loaded.assert_intact()


def test_all_dtypes_in_one_optimizer() -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = {d: weights([(3, 20)] * 2, d, DEVICE) for d in kinds}
    params |= {d: weights([(3, 20)], d, DEVICE) for d in (torch.complex64, torch.complex128)}
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, **TRITON}
    optimizer = build("SGD", [p for of_dtype in params.values() for p in of_dtype], options)
    oracles = {d: oracle_for("SGD", of_dtype, KERNELS, **options) for d, of_dtype in params.items()}
    for seed in range(2):
        for dtype, of_dtype in params.items():
            grads = grads_like(of_dtype, seed)
            assign(of_dtype, grads)
            oracles[dtype].load(of_dtype, states_of(optimizer, of_dtype))
            oracles[dtype].step(grads)
        optimizer.step()
        for dtype, of_dtype in params.items():
            oracles[dtype].check(of_dtype, states_of(optimizer, of_dtype))
    assert len(plan_of(optimizer).parts) == len(params)


@pytest.mark.usefixtures("unmerged")
@pytest.mark.parametrize("unit_dim", [0, 1])
def test_offsets_beyond_32_bits(unit_dim: int) -> None:
    shapes = ((3, 20), (2, 700), (2, 20_484)) if unit_dim == 0 else ((7, 3, 2, 2), (20_484, 2))
    run = GuardedRun(
        "SGD",
        weights(shapes, device=DEVICE, unit_dim=unit_dim),
        {**STATEFUL["SGD"], "unit_dim": unit_dim},
    )
    grads = grads_like(run.params, unit_dim=unit_dim)
    run.step(grads=grads)
    # As if each tensor began 24 GiB before where it is, and were stepped from there on.
    far = 3 << 31
    (part,) = plan_of(run.optimizer).parts
    launcher, tables = part.launches.launcher, part.launches.tables
    for launch in (launcher.untracked.opening, *launcher.untracked.steps):
        bound_args(launch)["tiles_ptr"][:, 1] += far
    addresses = tables.addresses
    for role in {*range(tables.roles)} - {abi.SCALARS}:  # a count has no offset
        addresses.view(tables.roles, -1)[role] -= far * 4
    altered = addresses.clone()
    for grad in grads:
        grad.mul_(-0.5)
    run.step(grads=grads)
    assert torch.equal(addresses, altered)
