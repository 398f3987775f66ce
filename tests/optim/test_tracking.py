"""``track_clipping``: what both paths record, in which steps, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton import AGC
from agc_triton.torch_path import blocks
from tests.support.optimizers import (
    CLIPPING,
    EACH_RULE,
    EACH_WAY,
    MODES,
    NAMES,
    STATEFUL,
    build,
    supported,
)
from tests.support.places import DEVICE, on_device
from tests.support.plans import plan_of
from tests.support.ratios import check_ratios, is_tracked, latest, ratios_of, same_latest
from tests.support.soak import soaked
from tests.support.tensors import assign, grads_like, parameters, same, weights

BACKENDS = ("torch", "torch, alone", "triton")
CASES = [
    (name, mode) for name in EACH_RULE for mode in MODES if supported(name, STATEFUL[name], mode)
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both backends; with the torch path small tensors are packed or each in its own block."""
    name, _, alone = request.param.partition(", ")
    if alone:
        monkeypatch.setattr(blocks, "PACKED", 0)
        monkeypatch.setattr(blocks, "BLOCK", 12)  # so that units of one tensor are in several
    return str(name)


def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """One that is clipped, one that is not."""
    return [{"params": list(params[:3])}, {"params": list(params[3:]), "clipping": 0}]


def started(name: str, backend: str, mode: str = "default", **options: Any) -> Any:
    params = [p.detach() for p in parameters()]
    params = on_device(params) if backend == "triton" else params
    own = {**STATEFUL[name], "clipping": CLIPPING, "backend": backend, **options}
    return build(name, groups(params), own, mode)


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def grads_of(
    params: Sequence[Tensor], step: int, without: int | None = None
) -> list[Tensor | None]:
    grads: list[Tensor | None] = [*grads_like(params, 10 * step)]
    if without is not None:
        grads[without] = None
    return grads


def check_run(tracked: Any, plain: Any, every: int, steps: int = 5) -> None:
    """Steps of two optimizers, of which one is tracked: the same bits, and the right ratios.

    In the second and third step the second parameter has no gradient.
    """
    params = params_of(tracked)
    expected: list[Any] = [None] * len(params)
    for step in range(1, steps + 1):
        before = [p.detach().clone() for p in params]
        grads = grads_of(before, step, without=1 if step in (2, 3) else None)
        for optimizer in (tracked, plain):
            assign(params_of(optimizer), copy.deepcopy(grads))
            optimizer.step()
        for i, (p, grad) in enumerate(zip(before, grads, strict=True)):
            if is_tracked(step, every) and grad is not None:
                expected[i] = ratios_of(p, grad), step
        for record, of_param in zip(latest(tracked, params), expected, strict=True):
            check_ratios(record, *of_param)
    assert same(params, params_of(plain))
    assert same([*tracked.state.values()], [*plain.state.values()])


@pytest.mark.parametrize(
    ("name", "every", "backend"),
    soaked(
        itertools.product(NAMES, (1, 2), BACKENDS),
        lambda name, every, backend: (
            name == "AdamW" or (every == 2 and (backend == "torch" or name in EACH_WAY))
        ),
    ),
    indirect=["backend"],
)
def test_ratios_of_each_step_that_is_tracked(name: str, every: int, backend: str) -> None:
    check_run(started(name, backend, track_clipping=every), started(name, backend), every)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_modes_of_torch(name: str, mode: str) -> None:
    check_run(started(name, "torch", mode, track_clipping=2), started(name, "torch", mode), 2)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adadelta])
def test_the_wrapper(base: Any, backend: str) -> None:
    def wrapped(**options: Any) -> Any:
        params = on_device(weights()) if backend == "triton" else weights()
        return AGC(base(groups(params), lr=0.1), clipping=CLIPPING, backend=backend, **options)

    check_run(wrapped(track_clipping=2), wrapped(), 2)


def test_steps_are_chosen_from_the_call_on(backend: str) -> None:
    optimizer = started("SGD", backend)
    params = params_of(optimizer)

    def numbers(every: int | None, steps: int) -> list[int]:
        """What the first parameter's record has as its step, after each of some more steps."""
        found = []
        if every is not None:
            optimizer.track_clipping(every)
        for step in range(steps):
            assign(params, grads_like(params, step))
            optimizer.step()
            record = latest(optimizer, params)[0]
            found.append(0 if record is None else record.number)
        return found

    assert numbers(None, 2) == [0, 0]
    assert numbers(3, 5) == [3, 3, 3, 6, 6]
    assert numbers(1, 2) == [8, 9]
    assert numbers(0, 2) == [9, 9]  # what there was stays
    assert numbers(2, 3) == [12, 12, 14]


def test_plans_serve_steps_that_are_tracked_and_others() -> None:
    optimizer = started("AdamW", "triton", track_clipping=2)
    params = params_of(optimizer)
    plans = []
    for step in range(4):
        assign(params, grads_like(params, step))
        optimizer.step()
        plans.append(plan_of(optimizer))
    assert all(plan is plans[0] for plan in plans)


def test_a_step_that_grad_scaler_skips_is_not_recorded(backend: str) -> None:
    optimizer = started("AdamW", backend, track_clipping=1)
    params = params_of(optimizer)
    device = params[0].device
    optimizer.grad_scale = torch.full((), 1024.0, device=device)
    for step, overflow in enumerate((1.0, 0.0, 1.0), 1):
        optimizer.found_inf = torch.full((), overflow, device=device)
        before, grads = [p.clone() for p in params], grads_like(params, step)
        assign(params, [grad * 1024.0 for grad in grads])
        optimizer.step()
        if step == 1:
            assert not any(record and record.number for record in latest(optimizer, params))
        elif step == 2:
            expected = [ratios_of(p, grad) for p, grad in zip(before, grads, strict=True)]
    for record, ratios in zip(latest(optimizer, params), expected, strict=True):
        check_ratios(record, ratios, 2)


@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
@pytest.mark.parametrize("nonfinite", ["propagate", "skip_unit"])
def test_units_that_are_not_finite(nonfinite: str, backend: str) -> None:
    optimizer = started("AdamW", backend, track_clipping=1, nonfinite=nonfinite)
    params = params_of(optimizer)
    grads = grads_like(params)
    grads[0][1, 2], grads[0][3, 0], grads[1][2] = torch.nan, torch.inf, -torch.inf
    assign(params, grads)
    before = [p.clone() for p in params]
    optimizer.step()
    records = latest(optimizer, params)
    for record, p, grad in zip(records, before, grads, strict=True):
        check_ratios(record, ratios_of(p, grad), 1)
    assert optimizer.skipped_units == (3 if nonfinite == "skip_unit" else 0)


def test_records_go_on_where_plans_are_made_anew(backend: str) -> None:
    optimizer = started("SGD", backend, track_clipping=2, nonfinite="skip_unit")
    params = params_of(optimizer)
    grads = grads_like(params)
    grads[0][0, 0] = torch.nan
    assign(params, grads)
    optimizer.step()
    before = latest(optimizer, params)
    added = on_device([torch.ones(3, 2)])[0] if backend == "triton" else torch.ones(3, 2)
    optimizer.add_param_group({"params": [added]})
    params[1].grad = None
    assign([params[0], added], grads_like([params[0], added]))
    optimizer.step()
    assert all(map(same_latest, latest(optimizer, params), before))
    assert latest(optimizer, [added])[0] is None
    assert optimizer.skipped_units == 1
    optimizer.step()
    assert [r and r.number for r in latest(optimizer, [params[0], added])] == [3, 3]


def test_units_change_where_nothing_is_clipped(backend: str) -> None:
    params = on_device(weights([(2, 3)])) if backend == "triton" else weights([(2, 3)])
    options = {"lr": 0.1, "clipping": 0, "track_clipping": 1, "backend": backend}
    optimizer: Any = build("SGD", params, options)
    for step, unit_dim in enumerate((None, 1), 1):
        optimizer.param_groups[0]["unit_dim"] = unit_dim
        before, grads = [p.clone() for p in params], grads_like(params, step)
        assign(params, grads)
        optimizer.step()
        for record, p, grad in zip(latest(optimizer, params), before, grads, strict=True):
            check_ratios(record, ratios_of(p, grad, unit_dim), step)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_copies_are_tracked_too_and_begin_anew(make: Any) -> None:
    for optimizer in (
        started("AdamW", "torch", track_clipping=2),
        AGC(torch.optim.SGD(groups(weights())), track_clipping=2),
    ):
        params = params_of(optimizer)
        assign(params, grads_like(params))
        optimizer.step()
        copied = make(optimizer)
        own = params_of(copied)
        assert latest(copied, own) == [None] * len(own)
        assign(own, grads_like(own))
        copied.step()
        assert [record and record.number for record in latest(copied, own)] == [1] * len(own)


def test_state_dicts_know_nothing_of_it() -> None:
    tracked, plain = started("AdamW", "torch", track_clipping=1), started("AdamW", "torch")
    for optimizer in (tracked, plain):
        assign(params_of(optimizer), grads_like(params_of(optimizer)))
        optimizer.step()
    assert same(tracked.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("every", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError)]
)
def test_what_is_no_number_of_steps(every: Any, error: type[Exception]) -> None:
    optimizer = started("SGD", "torch", track_clipping=3)
    with pytest.raises(error, match="every"):
        optimizer.track_clipping(every)
    assert optimizer._recorder.every == 3
    with pytest.raises(error, match="every"):
        started("SGD", "torch", track_clipping=every)


def test_on_the_device_that_others_are_on() -> None:
    """Records lie where their parameters do, and reading them brings all to the CPU."""
    params = [*weights([(3, 20)], device=DEVICE), *weights([(2, 12)])]
    optimizer: Any = build("SGD", params, {"lr": 0.1, "track_clipping": 1})
    assign(params, grads_like(params))
    optimizer.step()
    assert {page.device.type for page in optimizer._recorder.records.pages()} == {"cpu", DEVICE}
    assert [record and record.number for record in latest(optimizer, params)] == [1, 1]


@pytest.mark.parametrize("mode", ["default", "foreach"])
def test_options_that_units_depend_on_change(mode: str) -> None:
    optimizer = started("RMSprop", "torch", mode, track_clipping=1)
    plain = started("RMSprop", "torch", mode)
    params = params_of(optimizer)
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"clipping": 0},
        {"unit_dim": -1},
        {"clipping": 0.05, "unit_dim": None},
    )
    for step, change in enumerate(changes, 1):
        grads, before = grads_like(params, step), [p.clone() for p in params]
        for each in (optimizer, plain):
            for group in each.param_groups:
                group.update(change)
            assign(params_of(each), copy.deepcopy(grads))
            each.step()
        unit_dim = optimizer.param_groups[0]["unit_dim"]
        for record, p, grad in zip(latest(optimizer, params), before, grads, strict=True):
            check_ratios(record, ratios_of(p, grad, unit_dim), step)
    assert same(params, params_of(plain))
