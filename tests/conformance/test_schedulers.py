"""Every scheduler of torch drives the AGC classes and the wrapper as it drives torch's classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer, RMSprop, lr_scheduler
from torch.optim.swa_utils import SWALR

from agc_triton import AGC
from tests.support.checks import clipped
from tests.support.optimizers import PAIRS
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

CLIPPING = 0.02
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.9)],
        milestones=[2],
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}
# Those that schedulers cycle beside lr must not be 0.
CYCLED: dict[Any, dict[str, Any]] = {SGD: {"momentum": 0.9}, RMSprop: {"momentum": 0.9}}
# Two of them take no optimizer that has neither.
OPTIONS = {
    cls: {"lr": 0.1, **CYCLED.get(cls, {})}
    for cls in PAIRS
    if cls in CYCLED or "betas" in inspect.signature(cls).parameters
}
OURS = [PAIRS[cls] for cls in OPTIONS]


def make_wrapped(params: Any, clipping: float = CLIPPING, **options: Any) -> AGC:
    return AGC(SGD(params, **options), clipping=clipping)


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    classes = [(name, c) for name, c in vars(lr_scheduler).items() if isinstance(c, type)]
    base = lr_scheduler.LRScheduler
    names = {name for name, c in classes if issubclass(c, base) and c is not base}
    assert {name for name in names if not name.startswith("_")} | {"SWALR"} == set(SCHEDULERS)


@pytest.mark.parametrize(("make", "cls"), [*zip(OURS, OPTIONS, strict=True), (make_wrapped, SGD)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_torchs(name: str, make: Any, cls: Any) -> None:
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    optimizer = make(ours, clipping=CLIPPING, **OPTIONS[cls])
    expected = cls(theirs, **OPTIONS[cls])
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, expected)]
    settings = []
    for seed in range(5):
        set_grads(ours, seed)
        optimizer.step()
        set_grads(theirs, seed)
        for p in theirs:
            assert p.grad is not None
            p.grad = clipped(p.detach(), p.grad, CLIPPING)
        expected.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        (group,), (torchs,) = optimizer.param_groups, expected.param_groups
        assert same(
            {k: group[k] for k in torchs if k != "params"},
            {k: v for k, v in torchs.items() if k != "params"},
        )
        settings.append((group["lr"], group.get("momentum"), group.get("betas")))
    assert len(set(settings)) > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", OPTIONS)
def test_schedulers_change_a_tensor_lr_in_place(cls: Any) -> None:
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer, expected = PAIRS[cls](ours, lr=rate, clipping=CLIPPING), PAIRS[cls](theirs)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    expected.param_groups[0]["clipping"] = CLIPPING
    for seed in range(3):
        expected.param_groups[0]["lr"] = 0.1 * 0.5**seed
        train(optimizer, ours, range(seed, seed + 1))
        train(expected, theirs, range(seed, seed + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
