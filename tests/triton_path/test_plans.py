"""Plans are kept across steps, and refreshed when anything they depend on changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from agc_triton import AdamW_AGC, adaptive_clip_grad_
from tests.support.checks import nothing_changes
from tests.support.optimizers import ADAMW, CLIPPING, MOMENTUM, NAMES, STATEFUL
from tests.support.places import DEVICE, few_weights
from tests.support.plans import plan_of
from tests.support.tensors import weight
from tests.support.training import Training

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


def test_kept_while_gradients_and_values_change() -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train()
    plan = plan_of(training.optimizer)
    training.train()
    for without in ([1], [0, 2], []):
        training.move_grads(without)
        training.step()
    training.groups[0].update(lr=0.25, betas=(0.8, 0.9), clipping=0.5, maximize=True)
    training.train()
    training.groups[0].update(clipping=0)
    training.train()
    assert plan_of(training.optimizer) is plan


@pytest.mark.parametrize("without", [[], [1]], ids=["all", "some"])
def test_tables_are_copied_only_when_they_change(without: list[int], uploads: list[bool]) -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    for changes, expected in [({}, 1), ({}, 0), ({"lr": 0.25}, 1), ({}, 0)]:
        uploads.clear()
        training.groups[0].update(changes)
        if not training.optimizer.state:
            training.move_grads(without)
        training.step()
        assert len(uploads) == expected


@BACKENDS
@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_and_go(backend: str, name: str) -> None:
    training = Training(name, few_weights(), **STATEFUL[name], backend=backend)
    for without in ([0, 1, 2], [1, 2], [0, 2], [0, 1, 2], [1], []):
        training.move_grads(without)
        training.step()


@pytest.mark.parametrize("name", NAMES)
def test_any_set_of_gradients_takes_the_same_plan(name: str) -> None:
    training = Training(name, few_weights(), **STATEFUL[name])
    training.train()
    plan = training.optimizer._paths.triton.plan
    for without in ([0], [1, 2], [0, 2], [0, 1, 2], []):
        training.move_grads(without)
        training.step()
        assert training.optimizer._paths.triton.plan is plan


def test_states_that_were_loaded_need_no_gradient_to_be_planned() -> None:
    trained = Training("AdamW", few_weights(), **ADAMW)
    trained.train(2)
    training = Training("AdamW", few_weights(), **ADAMW)
    training.optimizer.load_state_dict(copy.deepcopy(trained.optimizer.state_dict()))
    for without in ([1, 2], [0], [2]):
        training.move_grads(without)
        training.step()
        assert len(plan_of(training.optimizer).parts[0].entries) == len(training.params)


def test_the_first_step_is_in_inference_mode() -> None:
    # States made there could not be written to later, as with torch.optim.
    training = Training("SGD", few_weights(), lr=0.5)
    training.move_grads()
    with torch.inference_mode():
        training.optimizer.step()
        adaptive_clip_grad_(training.params, clipping=CLIPPING, backend="triton")
    adaptive_clip_grad_(training.params, clipping=CLIPPING, backend="triton")
    training.train(2)


def test_backend_changes() -> None:
    training = Training("SGD", few_weights(), **MOMENTUM)
    training.train()
    training.optimizer.backend = "torch"
    training.train()
    assert training.optimizer._paths.triton.plan is None
    training.optimizer.backend = "triton"
    training.train()
    assert training.optimizer._paths.triton.plan is not None


@BACKENDS
def test_groups_are_added(backend: str) -> None:
    training = Training("AdamW", few_weights(), **ADAMW, backend=backend)
    training.train()
    more = few_weights(seed=7)
    training.optimizer.add_param_group({"params": more[:2], "lr": 0.25, "clipping": 0.5})
    training.train()
    training.optimizer.add_param_group({"params": more[2:], "maximize": True})
    training.train(2)


def exchange(groups: list[dict[str, Any]]) -> None:
    first, second = (group["params"] for group in groups)
    first[0], second[0] = second[0], first[0]


def replace(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"][0] = weight((3, 20), device=DEVICE, seed=9)


REGROUPED: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "exchanged": exchange,
    "replaced": replace,
    "reversed": lambda groups: groups.reverse(),
    "removed": lambda groups: groups.pop(),
}


@BACKENDS
@pytest.mark.parametrize("change", REGROUPED)
def test_parameters_change_groups(backend: str, change: str) -> None:
    first, second = few_weights(), few_weights(seed=5)
    groups = [{"params": first}, {"params": second, "lr": 0.125, "clipping": 0.5}]
    training = Training("SGD", groups, **MOMENTUM, backend=backend)
    training.train()
    REGROUPED[change](training.groups)
    before = {p: p.detach().clone() for p in (*first, *second)}
    training.train()
    present = set(training.params)
    for p in before:
        assert (p in present) != torch.equal(p, before[p])


@pytest.mark.parametrize("option", [{"foreach": True}, {"differentiable": True}, {"fused": False}])
def test_an_option_that_means_the_torch_path_is_refused(option: dict[str, Any]) -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    training.train()
    training.groups[0].update(option)
    training.move_grads()
    with (
        nothing_changes(training.params),
        pytest.raises((ValueError, RuntimeError), match="triton"),
    ):
        training.optimizer.step()


def test_one_plan_for_one_optimizer() -> None:
    # Two optimizers over the same parameters do not share tables.
    params = few_weights()
    first, second = Training("AdamW", params, **ADAMW), Training("AdamW", params, **ADAMW)
    first.train()
    second.train()
    first.step()
    assert isinstance(first.optimizer, AdamW_AGC)
    assert plan_of(first.optimizer) is not plan_of(second.optimizer)
