"""Every optimizer and option on the Triton path: the float64 oracle and the torch path agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import agc_triton.triton_path.compiling
from tests.support.checks import oracle_for, states_of, step_and_check, step_with
from tests.support.optimizers import (
    CLIPPING,
    EACH_WAY,
    NAMES,
    STATEFUL,
    TRITON,
    Kwargs,
    build,
    low_precision,
    options,
    takes,
)
from tests.support.optimizers import STEPS as RULE_STEPS
from tests.support.places import DEVICE, KERNELS, Place
from tests.support.plans import bound_args, bucket_plans, plan_of
from tests.support.rounded import Rounded, as_float64
from tests.support.soak import soaked
from tests.support.tensors import TILE_SHAPES, assign, grad_like, grads_like, weight, weights

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

# On which steps each parameter has a gradient: always, late, no longer, never.
SHAPES = ((4, 24), (7,), (), (2, 3, 2))
PRESENT = ("111", "011", "110", "000")
STEPS = 3


def present(grads: Sequence[Tensor], step: int) -> list[Tensor | None]:
    """Those of the parameters that have a gradient on this step."""
    return [g if p[min(step, 2)] == "1" else None for g, p in zip(grads, PRESENT, strict=True)]


class BothBackends:
    """The same optimizer on either backend, each beside an oracle of its roundings."""

    def __init__(self, name: str, start: Sequence[Tensor], options: Kwargs) -> None:
        places = (KERNELS, Place("torch", DEVICE))
        options = {**options, "clipping": CLIPPING}
        self.params = [[w.clone() for w in start] for _ in places]
        self.oracles = [oracle_for(name, start, place, **options) for place in places]
        self.optimizers = [
            build(name, params, {**options, "backend": place.backend})
            for params, place in zip(self.params, places, strict=True)
        ]

    def step(self, grads: Sequence[Tensor | None]) -> None:
        runs = zip(self.oracles, self.optimizers, self.params, strict=True)
        for oracle, optimizer, params in runs:
            oracle.step(grads)
            step_with(optimizer, params, grads)
        ours, theirs = map(states_of, self.optimizers, self.params)
        self.oracles[0].check(self.params[0], ours)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            self._assert_agree([o.params[i] for o in self.oracles], [p[i] for p in self.params])
            assert list(a) == list(b)
            for key in a:
                self._assert_agree([o.states[i][key] for o in self.oracles], [a[key], b[key]])

    def _assert_agree(self, expected: Sequence[Rounded], actual: Sequence[Tensor]) -> None:
        kinds = [(t.dtype, t.shape, t.stride()) for t in actual]
        assert kinds[0] == kinds[1]
        bound = sum(
            oracle.tolerance.margin * x.error
            for oracle, x in zip(self.oracles, expected, strict=True)
        )
        ours, theirs = map(as_float64, actual)
        off, oracles_off = abs(ours - theirs), abs(expected[0].value - expected[1].value)
        assert np.all(off <= bound + oracles_off)


# Adam differs from AdamW in how weights decay.
OPTIONS = [
    (name, label)
    for name in NAMES
    for label in options(name)
    if name != "Adam" or label in ("amsgrad", "decoupled")
]
# How numbers reach a rule depends on no rule.
ANYWHERE = ("plain", "defaults", "Tensor lr")
every_option = pytest.mark.parametrize(
    ("name", "label"),
    soaked(OPTIONS, lambda name, label: name in EACH_WAY or label not in ANYWHERE),
)
every_rule = pytest.mark.parametrize("name", NAMES)


@every_option
def test_follows_the_oracle_and_the_torch_path(name: str, label: str) -> None:
    params = weights(SHAPES, device=DEVICE)
    both = BothBackends(name, params, options(name)[label])
    for step in range(RULE_STEPS.get(name, STEPS)):
        both.step(present(grads_like(params, step), step))


@every_rule
def test_double_precision(name: str) -> None:
    params = weights(SHAPES, torch.float64, DEVICE)
    both = BothBackends(name, params, STATEFUL[name])
    for step in range(STEPS):
        both.step(present(grads_like(params, step), step))


@every_rule
def test_complex_parameters(name: str) -> None:
    params = weights([(3, 10)], torch.complex64, DEVICE)
    both = BothBackends(name, params, STATEFUL[name])
    for step in range(2):
        both.step(grads_like(params, step))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_rule
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    given = low_precision(name, STATEFUL[name]) if dtype is torch.float16 else STATEFUL[name]
    options = {**given, **TRITON}
    params = weights(SHAPES, dtype, DEVICE)
    optimizer = build(name, params, options)
    oracle = oracle_for(name, params, KERNELS, **options)
    for step in range(STEPS):
        # From the same rounded values, so that the bound is that of one step.
        oracle.load(params, states_of(optimizer, params))
        step_and_check(optimizer, oracle, params, present(grads_like(params, step), step))


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "capturable")])
def test_capturable_reads_hyperparameters_from_the_device(name: str) -> None:
    params = weights(SHAPES, device=DEVICE)
    lr, beta1, beta2 = (torch.tensor(value, device=DEVICE) for value in (0.5, 0.8, 0.9))
    options: dict[str, Any] = {**STATEFUL[name], "lr": lr, **TRITON}
    options |= {"betas": (beta1, beta2)} if name in ("Adam", "AdamW") else {}
    given = {**options, "capturable": True}
    optimizer = build(name, params, given)
    oracle = oracle_for(name, params, KERNELS, **options)
    for step in range(STEPS):
        oracle.options["lr"] = 0.5 / 2**step
        lr.fill_(0.5 / 2**step)
        step_and_check(optimizer, oracle, params, present(grads_like(params, step), step))


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_a_number_replaced_by_an_equal_tensor_on_the_device_is_read_there() -> None:
    params = weights(SHAPES, device=DEVICE)
    optimizer = build("AdamW", params, {"lr": 0.5, "capturable": True, **TRITON})
    step_with(optimizer, params, grads_like(params))
    lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device=DEVICE)
    optimizer.step()
    # As a graph replays it: a new value, and only the launches.
    lr.zero_()
    before = [p.clone() for p in params]
    plan_of(optimizer).begin(None, None, None, False)
    for part in plan_of(optimizer).parts:
        part.launches.update()
    assert all(map(torch.equal, params, before))


GROUPS: list[dict[str, Any]] = [
    {"clipping": 0.05, "lr": 0.5},
    {"clipping": None, "maximize": True},
    {"clipping": 1.5, "unit_dim": 1, "lr": 0.25, "maximize": True},
    {"clipping": 0, "agc_eps": 100.0},
    {"clipping": 0.02, "unit_dim": -1},
    {"clipping": 1e6, "agc_eps": 10.0, "lr": 0.125},
]


@pytest.mark.parametrize("name", EACH_WAY)
def test_groups_keep_their_own_settings_in_the_same_launches(name: str) -> None:
    params = [[weight((4, 24), device=DEVICE, seed=i)] for i in range(len(GROUPS))]
    groups = [{"params": p, **group} for p, group in zip(params, GROUPS, strict=True)]
    optimizer = build(name, groups, {**STATEFUL[name], **TRITON})
    oracles = [
        oracle_for(name, p, KERNELS, **{**STATEFUL[name], **TRITON, **group})
        for p, group in zip(params, GROUPS, strict=True)
    ]
    for step in range(2):
        for i, (p, oracle) in enumerate(zip(params, oracles, strict=True)):
            assign(p, grads_like(p, step + i))
            oracle.step([p[0].grad])
        optimizer.step()
        for p, oracle in zip(params, oracles, strict=True):
            oracle.check(p, states_of(optimizer, p))
    (plan,) = bucket_plans(optimizer)
    assert len(plan.buckets) == 2  # contiguous and strided units


SLIPS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"clipping": CLIPPING * (1 + 1e-4)}) for name in NAMES),
    *((name, {"lr": 0.5 * (1 + 1e-4)}) for name in NAMES),
    *((name, {"maximize": not STATEFUL[name].get("maximize")}) for name in NAMES),
    *((name, {"betas": (0.9, 0.999 + 1e-7)}) for name in ("Adam", "AdamW")),
]


@pytest.mark.parametrize(("name", "slip"), SLIPS, ids=str)
def test_bounds_are_narrow_enough_to_see(name: str, slip: dict[str, Any]) -> None:
    options = {**STATEFUL[name], **TRITON}
    param = weight((2, 24), device=DEVICE)
    optimizer = build(name, [param], {**options, **slip})
    oracle = oracle_for(name, [param], KERNELS, **options)
    param.grad = grad_like(param)
    oracle.step([param.grad])
    optimizer.step()
    with pytest.raises(AssertionError, match="are wrong"):
        oracle.check([param], states_of(optimizer, [param]))


@pytest.mark.parametrize("name", EACH_WAY)
def test_what_scratch_memory_held_does_not_matter(name: str) -> None:
    shapes = (TILE_SHAPES[0], TILE_SHAPES[3]) if name == "SGD" else TILE_SHAPES[:1]
    params = weights(shapes, device=DEVICE)
    optimizer = build(name, params, {**STATEFUL[name], **TRITON})
    oracle = oracle_for(name, params, KERNELS, **STATEFUL[name], clipping=CLIPPING)
    for step, value in enumerate((0.0, torch.inf, 1e300)):
        if step:
            (part,) = plan_of(optimizer).parts
            args = bound_args(part.launches.launcher.untracked.opening)
            args["prepared_ptr"].fill_(value)
            args["sums_ptr"].fill_(min(value, 1e38))
        step_and_check(optimizer, oracle, params, grads_like(params, step))


def test_more_tensors_than_one_program_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agc_triton.triton_path.compiling, "PREPARE_BLOCK", 2)
    params = weights([(3,)] * 5, device=DEVICE)
    options = {"lr": 0.5, "momentum": 0.9, **TRITON}
    optimizer, oracle = build("SGD", params, options), oracle_for("SGD", params, KERNELS, **options)
    for step in range(2):
        grads: list[Any] = grads_like(params, step)
        grads[3] = grads[3] if step else None
        step_and_check(optimizer, oracle, params, grads)
