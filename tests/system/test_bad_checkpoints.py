"""Checkpoints that do not fit load nothing; ours load with weights_only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from torch.nn import Parameter

from agc_triton import SGD_AGC
from agc_triton.optim import OPTIMIZERS
from tests.support.checks import nothing_changes
from tests.support.disk import on_disk
from tests.support.formulas import SCALARS, defaults
from tests.support.optimizers import EACH_WAY, NAMES, OURS
from tests.support.soak import soaked
from tests.support.tensors import parameters, same
from tests.support.training import on_backend, train, with_states

BACKENDS = ("torch", "triton")


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][1].pop(key)


def reshaped(saved: dict[str, Any]) -> None:
    for key, value in saved["state"][1].items():
        if key not in SCALARS:
            saved["state"][1][key] = value.flatten()


def of_other_optimizer(saved: dict[str, Any]) -> None:
    for key in {key for name in NAMES for key in defaults(name)} - {"lr", "maximize"}:
        saved["param_groups"][0].pop(key, None)


SPOILED: list[Any] = [
    *((name, reshaped, "shape") for name in NAMES),
    *((name, of_other_optimizer, "option") for name in NAMES),
    *((name, without("step"), "step") for name in NAMES[1:]),
    *((name, without("exp_avg_sq"), "exp_avg") for name in ("Adam", "AdamW")),
    *((name, without("max_exp_avg_sq"), "amsgrad") for name in ("Adam", "AdamW")),
    *(("RMSprop", without(key), "square_avg") for key in ("momentum_buffer", "grad_avg")),
]


@pytest.mark.parametrize(
    ("name", "spoil", "says", "backend"),
    soaked(
        [(*case, backend) for case in SPOILED for backend in BACKENDS],
        lambda name, spoil, says, backend: backend == "torch" or name == "AdamW",
    ),
)
def test_checkpoints_that_do_not_fit_load_nothing(
    name: str, spoil: Callable[[Any], Any], says: str, backend: str
) -> None:
    params = on_backend(backend)
    optimizer = with_states(name, params, backend)
    train(optimizer, params, range(2))
    saved = on_disk(optimizer.state_dict())
    spoil(saved)
    with nothing_changes(params, optimizer), pytest.raises(ValueError, match=says) as caught:
        optimizer.load_state_dict(saved)
    assert "checkpoint" in str(caught.value)
    train(optimizer, params, range(2, 3))


OTHER = "another optimizer|of other options"


@pytest.mark.parametrize("saver", OURS)
@pytest.mark.parametrize("loader", [OPTIMIZERS[name] for name in EACH_WAY])
def test_checkpoints_of_other_optimizers(saver: Any, loader: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, other = loader(params), saver(others)
    train(optimizer, params, range(1))
    train(other, others, range(1))
    rule, (group,) = loader.rule.kernel, optimizer.param_groups
    states = {*rule.scalars, *rule.states(group)} <= {*other.state[others[0]]}
    # Adam has all that AdamW and RAdam have; torch gives the rest its defaults.
    missing = {*defaults(loader.torch_class().__name__)} - {*other.param_groups[0]}
    if states and missing <= {"amsgrad", "fused", "foreach", "capturable", "differentiable"}:
        optimizer.load_state_dict(other.state_dict())
        assert same(optimizer.state_dict()["state"], other.state_dict()["state"])
        return
    with nothing_changes(params, optimizer), pytest.raises(ValueError, match=OTHER):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_truncated_checkpoints_load_nothing(key: str) -> None:
    params: list[Parameter] = parameters()
    optimizer = SGD_AGC(params, momentum=0.9)
    train(optimizer, params, range(1))
    saved = on_disk(optimizer.state_dict())
    del saved[key]
    with nothing_changes(params, optimizer), pytest.raises(KeyError, match=key):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("name", "backend"),
    soaked(
        itertools.product(NAMES, BACKENDS),
        lambda name, backend: backend == "torch" or name in EACH_WAY,
    ),
)
def test_every_checkpoint_loads_with_weights_only(name: str, backend: str) -> None:
    params = on_backend(backend)
    optimizer = with_states(name, params, backend, nonfinite="skip_unit")
    train(optimizer, params, range(2))
    saved = on_disk(optimizer.state_dict())  # torch.load(weights_only=True)
    assert same(saved, optimizer.state_dict())
