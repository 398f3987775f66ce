"""Every optimizer, option and mode of the torch path against the float64 oracle, step by step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checks import (
    oracle_for,
    states_of,
    step_and_check,
    step_with,
    tolerance_key,
    values_of,
)
from tests.support.formulas import defaults
from tests.support.optimizers import (
    CLIPPING,
    EACH_WAY,
    MODES,
    NAMES,
    STATEFUL,
    STATEFUL_CASES,
    Kwargs,
    build,
    low_precision,
    options,
    supported,
    takes,
)
from tests.support.optimizers import STEPS as RULE_STEPS
from tests.support.oracle import Oracle
from tests.support.places import Place
from tests.support.soak import packed_blocks, soaked
from tests.support.tensors import assign, grads_like, same, weights
from tests.support.tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("either_block")

# Which steps each parameter has a gradient on: always, late, with a gap, late, never, ...
SHAPES = ((4, 3), (3, 2, 2, 2), (5,), (3, 1, 1, 1), (2, 2), (), (6, 2), (4,))
PRESENT = ("111111", "011111", "101111", "011111", "000000", "111111", "111111", "111111")
LARGE = ((60, 700), (40,))  # the first is enough for torch to use two threads
STEPS = 4
WITH_FUSED = [name for name in NAMES if takes(name, "fused")]

CASES = [
    (name, label, mode, dtype)
    for name in NAMES
    for label, given in options(name).items()
    for mode in MODES
    for dtype in (torch.float32, torch.float64)
    if supported(name, given, mode)
    and (dtype is torch.float32 or label == "plain" or given == STATEFUL[name])
]


def quick(name: str, label: str, mode: str, dtype: torch.dtype) -> bool:
    """Every option in the default mode, and every state in the others; in fp64 both."""
    full = options(name)[label] == STATEFUL[name]
    return (
        full
        if dtype is torch.float64 and mode == "default"
        else (dtype is torch.float32 and (full or mode == "default"))
    )


FEWER_CASES = [
    (name, label, mode)
    for name in NAMES
    for label, given in options(name).items()
    for mode in MODES
    if supported(name, given, mode)
    and (mode == "default" or (given == STATEFUL[name] and mode in ("foreach", "not fused")))
]


def make_params(dtype: torch.dtype, device: str = "cpu", mode: str = "default") -> list[Tensor]:
    # torch.optim updates leaves that need a gradient only where autograd is off.
    params = weights(SHAPES, dtype, device)
    return params if mode == "differentiable" else [p.requires_grad_() for p in params]


def make_grads(params: Sequence[Tensor], step: int) -> list[Tensor | None]:
    given = zip(grads_like(params, step), PRESENT, strict=True)
    return [grad if present[step] == "1" else None for grad, present in given]


@functools.cache
def trajectory(name: str, label: str, dtype: torch.dtype, key: str) -> list[Oracle]:
    """The oracle after each step; the same for all modes that round alike."""
    params = weights(SHAPES, dtype)
    oracle = Oracle(name, params, TOLERANCES[key], clipping=CLIPPING, **options(name)[label])
    steps = RULE_STEPS.get(name, STEPS)
    return oracle.trajectory(make_grads(params, step) for step in range(steps))


@pytest.mark.parametrize(("name", "label", "mode", "dtype"), soaked(CASES, quick), ids=str)
def test_follows_the_oracle(
    name: str, label: str, mode: str, dtype: torch.dtype, torch_place: Place
) -> None:
    given = options(name)[label]
    params = make_params(dtype, torch_place.device, mode)
    optimizer = build(name, params, {**given, "clipping": CLIPPING, "backend": "torch"}, mode)
    expected = trajectory(name, label, dtype, tolerance_key(dtype, name, given, mode))
    for step, oracle in enumerate(expected):
        step_with(optimizer, params, make_grads(params, step))
        oracle.check(params, states_of(optimizer, params))


@packed_blocks
@pytest.mark.parametrize(
    ("name", "label", "mode", "dtype"),
    soaked(
        [(*case, dtype) for case in FEWER_CASES for dtype in (torch.bfloat16, torch.float16)],
        lambda name, label, mode, dtype: (
            dtype is torch.bfloat16 or options(name)[label] == STATEFUL[name]
        ),
    ),
    ids=str,
)
def test_low_precision_follows_the_oracle(
    name: str, label: str, mode: str, dtype: torch.dtype, torch_place: Place
) -> None:
    given: Kwargs = {**options(name)[label], "clipping": CLIPPING}
    if dtype is torch.float16:
        given = low_precision(name, given)
    params = make_params(dtype, torch_place.device)
    optimizer = build(name, params, {**given, "backend": "torch"}, mode)
    oracle = oracle_for(name, params, torch_place, mode, **given)
    for step in range(STEPS):
        # From the same rounded values, so that the bound is that of one step.
        oracle.load(params, states_of(optimizer, params))
        step_and_check(optimizer, oracle, params, make_grads(params, step))


GROUPS: list[dict[str, Any]] = [
    {"clipping": 0.05, "lr": 0.5},
    {"clipping": None, "maximize": True},
    {"clipping": 1.5, "unit_dim": 1, "lr": 0.25},
    {"clipping": 0, "agc_eps": 100.0},
    {"clipping": 0.02, "unit_dim": -1},
    {"agc_eps": 10.0, "lr": 0.125},
]


@packed_blocks
@pytest.mark.parametrize(
    ("name", "mode"), soaked(STATEFUL_CASES, lambda name, mode: name in EACH_WAY)
)
def test_groups_keep_their_own_settings(name: str, mode: str, torch_place: Place) -> None:
    given = {**STATEFUL[name], "clipping": 0.1}
    shapes = ((4, 3), (5,), (2, 3, 2))
    params = [torch_place.weights(shapes, seed=3 * i) for i in range(len(GROUPS))]
    groups = [{"params": p, **group} for p, group in zip(params, GROUPS, strict=True)]
    optimizer = build(name, groups, {**given, "backend": "torch"}, mode)
    oracles = [
        oracle_for(name, p, torch_place, mode, **{**given, **group})
        for p, group in zip(params, GROUPS, strict=True)
    ]
    for step in range(STEPS):
        for p, oracle in zip(params, oracles, strict=True):
            grads = grads_like(p, step)
            oracle.step(grads)
            assign(p, grads)
        optimizer.step()
        for p, oracle in zip(params, oracles, strict=True):
            oracle.check(p, states_of(optimizer, p))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", WITH_FUSED)
def test_fused_unscales_before_it_clips(name: str, shape: tuple[int, ...]) -> None:
    options = {**STATEFUL[name], "clipping": CLIPPING}
    params = make_params(torch.float32)
    optimizer: Any = build(name, params, options, "fused")
    oracle = Oracle(name, params, TOLERANCES["float32"], **options)
    # What GradScaler sets around step() of what takes scaled gradients, as other parameters of
    # this optimizer may; a power of two unscales exactly.
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 256.0), torch.zeros(shape)
    for step in range(STEPS):
        grads = make_grads(params, step)
        oracle.step(grads)
        step_with(optimizer, params, [None if g is None else g * 256 for g in grads])
        oracle.check(params, states_of(optimizer, params))


@packed_blocks
@pytest.mark.parametrize("mode", ["default", "foreach"])  # in blocks, and whole
@pytest.mark.parametrize("clipping", [0, CLIPPING])
@pytest.mark.parametrize("name", soaked(NAMES, lambda name: name in EACH_WAY))
def test_unscales_where_torchs_functions_would_not(name: str, clipping: float, mode: str) -> None:
    """As for a CPU parameter beside CUDA ones, with which the optimizer takes scaled gradients."""
    options = {**STATEFUL[name], "clipping": clipping}
    params = make_params(torch.float32)
    optimizer: Any = build(name, params, options, mode)
    oracle = Oracle(name, params, TOLERANCES["float32"], **options)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([256.0]), torch.zeros(1)
    for step in range(STEPS):
        grads = make_grads(params, step)
        oracle.step(grads)
        step_with(optimizer, params, [None if g is None else g * 256 for g in grads])
        oracle.check(params, states_of(optimizer, params))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", WITH_FUSED)
def test_nothing_moves_where_inf_was_found(name: str, before: int) -> None:
    params = make_params(torch.float32)
    optimizer: Any = build(name, params, {**STATEFUL[name], "clipping": CLIPPING}, "fused")
    for step in range(before):
        step_with(optimizer, params, make_grads(params, step))
    kept = copy.deepcopy(values_of(optimizer, params))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(256.0), torch.tensor(1.0)
    grads = make_grads(params, before)
    step_with(
        optimizer, params, [None if g is None else g * torch.inf for g in grads[:2]] + grads[2:]
    )
    assert same(values_of(optimizer, params), kept)


@packed_blocks  # neither
@pytest.mark.filterwarnings(
    # The parameter has to be computed for its gradient to be checked; step() reads its .grad.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
@pytest.mark.parametrize(
    ("name", "steps"),
    # The second step of torch's own Adamax and Rprop overwrites what autograd needs of the first.
    [
        (name, steps)
        for name in NAMES
        for steps in ((1,) if name in ("Adamax", "Rprop") else (1, 2))
    ],
)
def test_autograd_flows_through_the_clipped_step(name: str, steps: int) -> None:
    options = {key: 0.1 for key in ("weight_decay", "eps") if key in defaults(name)}
    options |= {"lr": 0.5, "clipping": CLIPPING}

    def train(weight: Tensor, grad: Tensor) -> Tensor:
        param = weight.clone()
        optimizer = build(name, [param], options, "differentiable")
        for scale in range(1, steps + 1):
            param.grad = grad * scale
            optimizer.step()
        return param

    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The first unit is over its limit, the second under, the third far over.
    grad = weight.flip(1) * torch.tensor([[0.3], [0.01], [10.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(train, (weight.requires_grad_(), grad.requires_grad_()))


@packed_blocks
@pytest.mark.parametrize("name", soaked(NAMES, lambda name: name in ("SGD", "AdamW")))
def test_two_runs_give_the_same_bits(name: str) -> None:
    def run() -> Any:
        params = weights(LARGE)
        optimizer = build(name, params, {**STATEFUL[name], "clipping": CLIPPING})
        for step in range(2):
            step_with(optimizer, params, grads_like(params, step))
        return values_of(optimizer, params)

    torch.set_num_threads(2)
    try:
        assert same(run(), run())
    finally:
        torch.set_num_threads(1)
