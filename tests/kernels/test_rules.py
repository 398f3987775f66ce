"""Every optimizer and option on the Triton path: the float64 oracle and the torch path agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import agc_triton.triton_path.launches
from agc_triton import adaptive_clip_grad_
from tests.support.cases import NAMES, OPTIONS, STATEFUL, Kwargs, build, step_with, tolerance_key
from tests.support.helpers import same
from tests.support.oracle import Oracle, Rounded, as_float64
from tests.support.tolerances import TOLERANCES
from tests.support.triton_cases import (
    CLIPPING,
    DEVICE,
    TRITON,
    KernelOracle,
    bound_args,
    bucket_plans,
    check_clipped,
    make_grad,
    make_weight,
    on_device,
    plan_of,
    states_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

# On which steps each parameter has a gradient: always, late, no longer, never.
SHAPES = ((4, 24), (7,), (), (2, 3, 2))
PRESENT = ("111", "011", "110", "000")
STEPS = 3


def make_weights(dtype: torch.dtype) -> list[Tensor]:
    return [make_weight(shape, seed=i).to(dtype) for i, shape in enumerate(SHAPES)]


def make_grads(dtype: torch.dtype, step: int) -> list[Tensor | None]:
    return [
        make_grad(shape, seed=10 * step + i).to(dtype) if present[step] == "1" else None
        for i, (shape, present) in enumerate(zip(SHAPES, PRESENT, strict=True))
    ]


class BothBackends:
    """The same optimizer on either backend, each beside an oracle of its roundings."""

    def __init__(self, name: str, weights: Sequence[Tensor], options: Kwargs) -> None:
        dtype, mode = weights[0].dtype, "default"
        options = {**options, "clipping": CLIPPING}
        theirs = TOLERANCES[tolerance_key(dtype, name, options, mode)]
        self.oracles = (
            KernelOracle(name, weights, **options),
            Oracle(name, weights, theirs, **options),
        )
        self.params = [[w.clone().to(DEVICE) for w in weights] for _ in self.oracles]
        self.optimizers = [
            build(name, params, {**options, "backend": backend})
            for params, backend in zip(self.params, ("triton", "torch"), strict=True)
        ]

    def step(self, grads: Sequence[Tensor | None]) -> None:
        runs = zip(self.oracles, self.optimizers, self.params, strict=True)
        for oracle, optimizer, params in runs:
            oracle.step(grads)
            step_with(optimizer, params, on_device(grads))
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


every_option = pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name in NAMES for label in OPTIONS[name]]
)
every_rule = pytest.mark.parametrize("name", NAMES)


@every_option
def test_follows_the_oracle_and_the_torch_path(name: str, label: str) -> None:
    both = BothBackends(name, make_weights(torch.float32), OPTIONS[name][label])
    for step in range(STEPS):
        both.step(make_grads(torch.float32, step))


@every_rule
def test_double_precision(name: str) -> None:
    both = BothBackends(name, make_weights(torch.float64), STATEFUL[name])
    for step in range(STEPS):
        both.step(make_grads(torch.float64, step))


@every_rule
def test_complex_parameters(name: str) -> None:
    def pair(make: Any, seed: int) -> Tensor:
        return torch.complex(*(make((3, 10), seed=seed + i).float() for i in range(2)))

    both = BothBackends(name, [pair(make_weight, 0)], STATEFUL[name])
    for step in range(2):
        both.step([pair(make_grad, 10 * step)])


def low_precision_options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    options = {**STATEFUL[name]}
    if dtype is torch.float16:
        # 1e-8 is 0 there, and so are squares of small gradients: no variance is left to center.
        options |= {"eps": 0.1} if name != "SGD" else {}
        options |= {"centered": False} if name == "RMSprop" else {}
    return options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_rule
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    options = {**low_precision_options(name, dtype), **TRITON}
    params = on_device(make_weights(dtype))
    optimizer = build(name, params, options)
    oracle = KernelOracle(name, params, **options)
    for step in range(STEPS):
        grads = on_device(make_grads(dtype, step))
        # From the same rounded values, so that the bound is that of one step.
        oracle.load(params, states_of(optimizer, params))
        oracle.step(grads)
        step_with(optimizer, params, grads)
        oracle.check(params, states_of(optimizer, params))


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_capturable_reads_hyperparameters_from_the_device(name: str) -> None:
    options: dict[str, Any] = {"lr": torch.tensor(0.5), "weight_decay": 0.1, **TRITON}
    options |= {"betas": (torch.tensor(0.8), torch.tensor(0.9))} if "Adam" in name else {}
    params = on_device(make_weights(torch.float32))
    given = on_device({**options, "capturable": True})
    optimizer = build(name, params, given)
    oracle = KernelOracle(name, params, **options)
    for step in range(STEPS):
        oracle.options["lr"] = 0.5 / 2**step
        given["lr"].fill_(0.5 / 2**step)
        grads = on_device(make_grads(torch.float32, step))
        oracle.step(grads)
        step_with(optimizer, params, grads)
        oracle.check(params, states_of(optimizer, params))


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_a_number_replaced_by_an_equal_tensor_on_the_device_is_read_there() -> None:
    params = on_device(make_weights(torch.float32))
    optimizer = build("AdamW", params, {"lr": 0.5, "capturable": True, **TRITON})
    step_with(optimizer, params, on_device(make_grads(torch.float32, 0)))
    lr = optimizer.param_groups[0]["lr"] = on_device(torch.tensor(0.5))
    optimizer.step()
    # As a graph replays it: a new value, and only the launches.
    lr.zero_()
    before = [p.clone() for p in params]
    plan_of(optimizer).begin(None, None, False)
    for part in plan_of(optimizer).parts:
        part.launches.update()
    assert all(map(torch.equal, params, before))


GROUPS: list[dict[str, Any]] = [
    {"clipping": 0.05, "lr": 0.5},
    {"clipping": None, "weight_decay": 0.2},
    {"clipping": 1.5, "unit_dim": 1, "lr": 0.25, "maximize": True},
    {"clipping": 0, "agc_eps": 100.0},
    {"clipping": 0.02, "unit_dim": -1},
    {"clipping": 1e6, "agc_eps": 10.0, "weight_decay": 0.0},
]


@every_rule
def test_groups_keep_their_own_settings_in_the_same_launches(name: str) -> None:
    params = [[make_weight((4, 24), seed=i).float().to(DEVICE)] for i in range(len(GROUPS))]
    groups = [{"params": p, **group} for p, group in zip(params, GROUPS, strict=True)]
    optimizer = build(name, groups, {**STATEFUL[name], **TRITON})
    oracles = [
        KernelOracle(name, p, **{**STATEFUL[name], **TRITON, **group})
        for p, group in zip(params, GROUPS, strict=True)
    ]
    for step in range(2):
        for i, (p, oracle) in enumerate(zip(params, oracles, strict=True)):
            p[0].grad = make_grad((4, 24), seed=step + i).float().to(DEVICE)
            oracle.step([p[0].grad])
        optimizer.step()
        for p, oracle in zip(params, oracles, strict=True):
            oracle.check(p, states_of(optimizer, p))
    (plan,) = bucket_plans(optimizer)
    assert len(plan.buckets) == 2  # contiguous and strided units


SLIPS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"clipping": CLIPPING * (1 + 1e-4)}) for name in NAMES),
    *((name, {"lr": 0.5 * (1 + 1e-4)}) for name in NAMES),
    *((name, {"maximize": True}) for name in NAMES),
    *((name, {"betas": (0.9, 0.999 + 1e-7)}) for name in ("Adam", "AdamW")),
]


@pytest.mark.parametrize(("name", "slip"), SLIPS, ids=str)
def test_bounds_are_narrow_enough_to_see(name: str, slip: dict[str, Any]) -> None:
    options: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1, **TRITON}
    param = make_weight((2, 24)).float().to(DEVICE)
    optimizer = build(name, [param], {**options, **slip})
    oracle = KernelOracle(name, [param], **options)
    param.grad = make_grad((2, 24)).float().to(DEVICE)
    oracle.step([param.grad])
    optimizer.step()
    with pytest.raises(AssertionError, match="are wrong"):
        oracle.check([param], states_of(optimizer, [param]))


@every_rule
def test_two_runs_give_the_same_bits(name: str) -> None:
    def run() -> Any:
        params = on_device(make_weights(torch.float32))
        optimizer = build(name, params, {**STATEFUL[name], **TRITON})
        for step in range(2):
            step_with(optimizer, params, on_device(make_grads(torch.float32, step)))
        return params, states_of(optimizer, params)

    assert same(run(), run())


@every_rule
def test_what_scratch_memory_held_does_not_matter(name: str) -> None:
    shapes = ((3, 20), (1, 2, 10_245)) if name == "SGD" else ((3, 20),)
    params = [make_weight(shape).float().to(DEVICE) for shape in shapes]
    optimizer = build(name, params, {**STATEFUL[name], **TRITON})
    oracle = KernelOracle(name, params, **STATEFUL[name], clipping=CLIPPING)
    for step, value in enumerate((0.0, torch.inf, 1e300)):
        if step:
            (part,) = plan_of(optimizer).parts
            args = bound_args(part.launches.launcher.opening)
            args["prepared_ptr"].fill_(value)
            args["sums_ptr"].fill_(min(value, 1e38))
        grads = [make_grad(p.shape, seed=step).float().to(DEVICE) for p in params]
        oracle.step(grads)
        step_with(optimizer, params, grads)
        oracle.check(params, states_of(optimizer, params))


def weights_and_grads(kind: str) -> tuple[Tensor, Tensor]:
    weight, grad = make_weight((3, 6)), make_grad((3, 6))
    if kind == "zero weights":
        weight[1:] = 0.0
        grad[2] *= 1e-7
    elif kind == "zero gradients":
        grad[1] = 0.0
    elif kind == "tiny gradients":
        grad[1] *= 1e-9  # a norm under the 1e-6 of the definition
    return weight.float(), grad.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("agc_eps", [0.0, 1e-3, 1e-9])
@pytest.mark.parametrize("kind", ["zero weights", "zero gradients", "tiny gradients"])
def test_units_of_next_to_nothing(kind: str, agc_eps: float, dtype: torch.dtype) -> None:
    weight, grad = (tensor.to(dtype) for tensor in weights_and_grads(kind))
    options = {"lr": 0.5, **TRITON, "agc_eps": agc_eps}
    param = weight.to(DEVICE)
    oracle = KernelOracle("SGD", [weight], **options)
    optimizer = build("SGD", [param], options)
    oracle.step([grad])
    step_with(optimizer, [param], [grad.to(DEVICE)])
    oracle.check([param], states_of(optimizer, [param]))


# numpy, which the interpreter computes with, warns of 0 * inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_rule
def test_what_is_not_finite_stays_in_its_unit_as_on_the_torch_path(name: str, value: float) -> None:
    results = []
    for backend in ("triton", "torch"):
        param = make_weight((3, 6)).float().to(DEVICE)
        options = {**STATEFUL[name], "clipping": CLIPPING, "backend": backend}
        optimizer = build(name, [param], options)
        grad = make_grad((3, 6)).float().to(DEVICE)
        grad[1, 2] = value
        step_with(optimizer, [param], [grad])
        results.append([param.isnan(), *(x.isnan() for x in optimizer.state[param].values())])
    assert same(*results)
    assert bool(results[0][0].any())


def test_more_tensors_than_one_program_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agc_triton.triton_path.launches, "PREPARE_BLOCK", 2)
    params = [make_weight((3,), seed=i).float().to(DEVICE) for i in range(5)]
    options = {"lr": 0.5, "momentum": 0.9, **TRITON}
    optimizer, oracle = build("SGD", params, options), KernelOracle("SGD", params, **options)
    for step in range(2):
        grads: list[Any] = [make_grad((3,), seed=step + i).float().to(DEVICE) for i in range(5)]
        grads[3] = grads[3] if step else None
        oracle.step(grads)
        step_with(optimizer, params, grads)
        oracle.check(params, states_of(optimizer, params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_units_next_to_their_limit(dtype: torch.dtype) -> None:
    # Norms of 4, and so limits of 1.
    param = torch.full((2, 4), 2.0, dtype=dtype, device=DEVICE)
    grad = torch.zeros_like(param)
    grad[0, 1], grad[1, 2] = 1 - 1e-5, 1 + 1e-5
    param.grad = grad.clone()
    adaptive_clip_grad_([param], 0.25, backend="triton")
    assert torch.equal(param.grad[0], grad[0])
    assert not torch.equal(param.grad[1], grad[1])
    check_clipped(param, grad, param.grad, clipping=0.25)


def test_at_a_limit_under_the_smallest_norm_divided_by_no_bit_changes() -> None:
    # Norm and limit are 2**-22, exactly; divided by 1e-6 it would be scaled to a quarter.
    param = torch.zeros(1, 4, device=DEVICE)
    param.grad = torch.zeros_like(param)
    param.grad[0, 1] = 2.0**-22
    before = param.grad.clone()
    adaptive_clip_grad_([param], 0.5, agc_eps=2.0**-21, backend="triton")
    assert torch.equal(param.grad, before)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64],
    ids=str,
)
def test_clipping_alone(dtype: torch.dtype) -> None:
    def make(values: Any, shape: tuple[int, ...], seed: int) -> Tensor:
        if dtype.is_complex:
            return torch.complex(*(values(shape, seed=seed + i).float() for i in range(2)))
        result: Tensor = values(shape, seed=seed).to(dtype)
        return result

    shapes = ((4, 24), (2, 300), (7,), (3,))
    params = [make(make_weight, shape, i).to(DEVICE) for i, shape in enumerate(shapes)]
    grads = [make(make_grad, shape, i) for i, shape in enumerate(shapes)]
    kept = [p.clone() for p in params]
    for param, grad in zip(params[:-1], grads, strict=False):
        param.grad = grad.clone().to(DEVICE)
    adaptive_clip_grad_(params, CLIPPING, backend="triton")
    assert same(params, kept)
    assert params[-1].grad is None
    for param, grad in zip(params[:-1], grads, strict=False):
        check_clipped(param, grad, param.grad)


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_weight_without_decay_stays_infinite(name: str) -> None:
    weight = make_weight((2, 3)).float()
    weight[0, 1] = torch.inf
    results = []
    for backend in ("triton", "torch"):
        param = weight.to(DEVICE)
        optimizer = build(name, [param], {**STATEFUL[name], "weight_decay": 0, "backend": backend})
        for seed in range(2):
            step_with(optimizer, [param], [make_grad((2, 3), seed=seed).float().to(DEVICE)])
        results.append(param)
    assert results[0].isinf().equal(weight.isinf().to(DEVICE))
    torch.testing.assert_close(*results)
