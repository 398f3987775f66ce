"""nonfinite="skip_unit": units left alone, bit for bit, and their number."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton.torch_path import blocks
from tests.support.checks import states_of, step_with
from tests.support.optimizers import (
    EACH_WAY,
    MODES,
    STATEFUL,
    WAY_CASES,
    Kwargs,
    build,
    low_precision,
    takes,
)
from tests.support.places import DEVICE, on_device
from tests.support.plans import tile_shapes
from tests.support.soak import soaked
from tests.support.tensors import grads_like, in_order, parameters, same, weight

# numpy, which the interpreter computes with, warns of inf * 0 and of squares that overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

NAN, INF = float("nan"), float("inf")
OPTIONS: dict[str, Kwargs] = {
    name: {**STATEFUL[name], "weight_decay": 0.1, "clipping": 0.05} for name in EACH_WAY
}
every_name = pytest.mark.parametrize("name", EACH_WAY)


BACKENDS = ("torch", "torch, alone", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both backends; with the torch path small tensors are joined or each in its own block."""
    name, _, alone = request.param.partition(", ")
    if alone:
        monkeypatch.setattr(blocks, "PACKED", 0)
    return str(name)


# Index of a parameter, index of one of its elements, value.
Spoil = tuple[int, tuple[int, ...], float]


def placed(tensors: Sequence[Tensor], backend: str) -> list[Tensor]:
    moved = [t.detach().clone() for t in tensors]
    return on_device(moved) if backend == "triton" else moved


def in_unit(param: Tensor, at: tuple[int, ...], unit_dim: int = 0) -> Tensor:
    """Which elements share a unit with that at ``at``."""
    mask = torch.zeros(param.shape, dtype=torch.bool, device=param.device)
    if sum(size != 1 for size in param.shape) <= 1:
        return mask.fill_(True)
    mask.select(unit_dim, at[unit_dim]).fill_(True)
    return mask


def tensors_of(optimizer: Any, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    pairs = zip(params, states_of(optimizer, params), strict=True)
    copies = [{"p": p.detach(), **state} for p, state in pairs]
    return copy.deepcopy(copies)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_step(
    name: str,
    optimizer: Any,
    options: Kwargs,
    grads: Sequence[Tensor],
    spoils: Sequence[Spoil],
    unit_dim: int = 0,
) -> None:
    """A step with spoiled gradients beside one of a copy with good ones."""
    params = optimizer.param_groups[0]["params"]
    before, count = tensors_of(optimizer, params), optimizer.skipped_units
    copied = [p.detach().clone() for p in params]
    # A compiler may round a kernel without the option differently, the interpreter does not.
    nonfinite = "propagate" if DEVICE == "cpu" else "skip_unit"
    twin = build(name, copied, {**options, "nonfinite": nonfinite})
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, copy_of_p in zip(params, copied, strict=True):  # loading rounds them to p's dtype
        held = optimizer.state[p].keys() & {*optimizer.rule.kernel.scalars}
        twin.state[copy_of_p].update({key: optimizer.state[p][key].clone() for key in held})
    for attribute in ("grad_scale", "found_inf"):
        if hasattr(optimizer, attribute):
            setattr(twin, attribute, getattr(optimizer, attribute))
    step_with(twin, copied, grads)
    spoiled = [grad.clone() for grad in grads]
    skipped = [torch.zeros(p.shape, dtype=torch.bool, device=p.device) for p in params]
    units = set()
    for i, at, value in spoils:
        spoiled[i][at] = value
        skipped[i] |= in_unit(params[i], at, unit_dim)
        whole = sum(size != 1 for size in params[i].shape) <= 1
        units.add((i, 0 if whole else at[unit_dim]))
    step_with(optimizer, params, spoiled)
    after, expected = tensors_of(optimizer, params), tensors_of(twin, copied)
    for i, bad in enumerate(skipped):
        assert after[i].keys() == expected[i].keys()
        for key, new in after[i].items():
            if key in optimizer.rule.kernel.scalars:
                assert torch.equal(new, expected[i][key])
                continue
            old = before[i].get(key, torch.zeros_like(new))
            assert torch.equal(bits(new[bad]), bits(old[bad])), (key, "of a skipped unit")
            assert torch.equal(bits(new[~bad]), bits(expected[i][key][~bad])), key
    assert optimizer.skipped_units == count + len(units)


def check_skips(
    name: str,
    params: Sequence[Tensor],
    options: Kwargs,
    steps: Sequence[Sequence[Spoil]],
    unit_dim: int = 0,
) -> Any:
    options = {**options, "nonfinite": "skip_unit"}
    optimizer: Any = build(name, params, options)
    for step, spoils in enumerate(steps):
        grads = [g.to(p.device) for p, g in zip(params, grads_like(params, step), strict=True)]
        check_step(name, optimizer, options, grads, spoils, unit_dim)
    return optimizer


# SHAPES: (6, 5), (4, 3, 2, 2), (6,), (4, 1, 1, 1), (). The second step has nothing to skip.
STEPS: list[list[Spoil]] = [
    [(0, (1, 2), NAN), (0, (1, 4), INF), (0, (5, 0), -INF), (2, (3,), NAN)],
    [],
    [(0, (0, 0), 3e19), (1, (2, 1, 1, 0), INF), (3, (1, 0, 0, 0), NAN), (4, (), INF)],
    [(1, (0, 0, 0, 0), NAN), (2, (0,), INF), (4, (), 1e30)],
]


@pytest.mark.parametrize(
    ("name", "backend"),
    soaked(
        itertools.product(EACH_WAY, BACKENDS),
        lambda name, backend: backend != "triton" or name in ("SGD", "AdamW"),
    ),
    indirect=["backend"],
)
def test_skipped_units_keep_their_bits_and_others_go_on(name: str, backend: str) -> None:
    params = placed(parameters(), backend)
    check_skips(name, params, {**OPTIONS[name], "backend": backend}, STEPS)


@pytest.mark.usefixtures("either_block")
@pytest.mark.parametrize(("name", "mode"), WAY_CASES)
def test_every_mode_of_the_torch_path(name: str, mode: str) -> None:
    options = {**OPTIONS[name], **MODES[mode]}
    check_skips(name, placed(parameters(), "torch"), options, STEPS)


@every_name
def test_units_along_another_dimension_and_in_another_memory_order(name: str, backend: str) -> None:
    params = [in_order(weight((4, 3, 2)), (2, 0, 1)), weight((3, 4))]
    options = {**OPTIONS[name], "unit_dim": 1, "backend": backend}
    steps: list[list[Spoil]] = [[(0, (3, 2, 1), NAN)], [(0, (0, 0, 0), INF), (1, (0, 3), NAN)]]
    check_skips(name, on_device(params), options, steps, unit_dim=1)


@every_name
def test_blocks_that_cut_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(blocks, "PACKED", 0)
    params = [
        weight((3, 50)),
        weight((40,)),
        in_order(weight((5, 3, 4)), (1, 0, 2)),
        weight((9, 4)),
    ]
    steps: list[list[Spoil]] = [
        [(0, (1, 49), NAN), (1, (20,), INF), (2, (4, 2, 3), NAN), (3, (8, 0), NAN)],
        [(0, (0, 0), INF), (0, (2, 30), INF), (2, (0, 0, 0), NAN), (3, (0, 3), NAN)],
    ]
    check_skips(name, params, OPTIONS[name], steps)


@pytest.mark.parametrize("name", soaked(EACH_WAY, lambda name: name == "AdamW"))
def test_units_that_several_programs_share_are_counted_once(name: str) -> None:
    params = on_device([weight((2, 20_484)), weight((20_481,))])
    options = {**OPTIONS[name], "backend": "triton"}
    steps: list[list[Spoil]] = [[(0, (1, 20_483), NAN)], [(0, (0, 9000), INF), (1, (0,), NAN)]]
    optimizer = check_skips(name, params, options, steps)
    assert any(shape.split for shape in tile_shapes(optimizer))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    params = on_device([weight((4, 3), dtype), weight((5,), dtype)])
    options = {**OPTIONS["AdamW"], "backend": backend}
    if dtype.itemsize == 2:
        options = {**low_precision("AdamW", options)}
    steps: list[list[Spoil]] = [[(0, (2, 1), NAN)], [(0, (0, 2), INF), (1, (4,), -INF)]]
    check_skips("AdamW", params, options, steps)


@pytest.mark.parametrize(
    ("name", "clipping"),
    soaked(
        itertools.product(EACH_WAY, (0, None)),
        lambda name, clipping: clipping == 0 or name == "AdamW",
    ),
)
def test_groups_without_clipping_have_units_too(
    name: str, backend: str, clipping: float | None
) -> None:
    params = placed(parameters(), backend)
    options = {**OPTIONS[name], "clipping": clipping, "backend": backend}
    if backend == "torch":  # the for-loop, which is what torch.optim runs where nothing is skipped
        options["fused" if takes(name, "fused") else "foreach"] = False
    check_skips(name, params, options, STEPS[2:])


@pytest.mark.parametrize(
    ("dtype", "name"),
    soaked(
        itertools.product((torch.float32, torch.bfloat16), EACH_WAY),
        lambda dtype, name: name == "AdamW" or dtype is torch.float32,
    ),
    ids=str,
)
def test_a_scaled_gradient_counts_as_what_it_unscales_to(
    dtype: torch.dtype, name: str, backend: str
) -> None:
    params = placed([weight((3, 4), dtype), weight((5,), dtype), weight((), dtype)], backend)
    options = {**OPTIONS[name], "backend": backend, "nonfinite": "skip_unit"}
    optimizer: Any = build(name, params, options)
    optimizer.grad_scale = torch.full((), 2.0**16, device=params[0].device)
    optimizer.found_inf = torch.zeros((), device=params[0].device)
    large = [g.to(p.device) * 2.0**16 for p, g in zip(params, grads_like(params, 0), strict=True)]
    check_step(name, optimizer, options, large, [(0, (1, 1), NAN), (1, (0,), INF)])
    # Their squares overflow as long as they are scaled.
    finite: list[Spoil] = [(0, (0, 0), 1e20), (1, (1,), 1e20), (2, (), 1e20)]
    spoiled = [g.clone() for g in large]
    for i, at, value in finite:
        spoiled[i][at] = value
    before = tensors_of(optimizer, params)
    step_with(optimizer, params, spoiled)
    assert optimizer.skipped_units == 2
    after = tensors_of(optimizer, params)
    assert all(bool((a["p"] != b["p"]).all()) for a, b in zip(after, before, strict=True))
    check_step(name, optimizer, options, large, [(0, (2, 1), 1e25), (1, (0,), 1e25), (2, (), 1e25)])


def test_steps_that_grad_scaler_skips_count_nothing(backend: str) -> None:
    params = placed(parameters(), backend)
    optimizer: Any = build("AdamW", params, {"backend": backend, "nonfinite": "skip_unit"})
    optimizer.found_inf = torch.ones((), device=params[0].device)
    for p in params:
        p.grad = torch.full_like(p, NAN)
    before = copy.deepcopy(params)
    optimizer.step()
    assert same(params, before)
    assert optimizer.skipped_units == 0


def test_the_option_can_change_between_steps(backend: str) -> None:
    params = placed([weight((3, 4))], backend)
    optimizer: Any = build("SGD", params, {"backend": backend})
    for nonfinite, expected in (("skip_unit", False), ("propagate", True)):
        optimizer.nonfinite = nonfinite
        params[0].grad = torch.ones_like(params[0])
        params[0].grad[1] = NAN
        optimizer.step()
        assert bool(params[0].isnan().any()) is expected
    assert optimizer.skipped_units == 1
