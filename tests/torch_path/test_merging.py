"""Groups of equal options are stepped together, and nothing else tells that they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton.torch_path.merging import merged
from tests.optim.test_errors import assert_says
from tests.support.checks import nothing_changes
from tests.support.optimizers import CLIPPING, EACH_WAY, STATEFUL, build
from tests.support.places import Place
from tests.support.tensors import SHAPES, set_grads
from tests.support.training import Training, train


def groups_of(params: list[Tensor], *options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": [p], **option} for p, option in zip(params, options, strict=True)]


def together(groups: list[dict[str, Any]]) -> list[list[int]]:
    return [each.indices for each in merged(enumerate(groups))]


def test_groups_of_equal_options_are_taken_together() -> None:
    rate = torch.tensor(0.1)
    options: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": rate}, {"lr": 0.1}, {"lr": rate.clone()}]
    options += [{"lr": 0.1, "betas": [0.9]}, {"lr": 0.1, "betas": [0.9]}, {"lr": 0.1}]
    params = list(torch.zeros(len(options)).unbind())
    groups = groups_of(params, *options)
    assert together(groups) == [[0, 2, 6], [1], [3], [4], [5]]
    assert [len(group["params"]) for group in groups] == [1] * len(groups)
    names = [{**group, "param_names": [str(i)]} for i, group in enumerate(groups)]
    assert together(names) == together(groups)


@pytest.mark.parametrize("name", EACH_WAY)
def test_steps_follow_the_oracle_while_options_come_and_go(name: str, torch_place: Place) -> None:
    params = torch_place.weights(SHAPES)
    options = {**STATEFUL[name], "clipping": CLIPPING, "backend": "torch"}
    training = Training(name, [{"params": [p]} for p in params], **options)
    training.train(2)
    blocks = training.optimizer._paths.torch.blocks
    assert {index for index, _ in blocks} == {0}
    for index, change in ((1, {"lr": 0.25}), (3, {"clipping": 0.5}), (2, {"agc_eps": 0.1})):
        training.groups[index].update(change)
        training.train(1)
    for group in training.groups:
        group.update(lr=0.125, clipping=CLIPPING, agc_eps=1e-3)
    training.train(2)
    assert {index for index, _ in training.optimizer._paths.torch.blocks} == {0}


@pytest.mark.parametrize("spoil", ["option", "gradient"])
def test_errors_name_the_group_that_is_meant(spoil: str, torch_place: Place) -> None:
    params = torch_place.weights(SHAPES)
    optimizer = build("SGD", [{"params": [p]} for p in params], {"lr": 0.1, "clipping": 1.0})
    train(optimizer, params, range(1))
    set_grads(params, 1)
    if spoil == "option":
        optimizer.param_groups[2]["clipping"] = True  # equal to 1.0
    else:
        grad = params[2].grad
        assert grad is not None
        params[2].grad = grad.to_sparse()
    with nothing_changes(params, optimizer), pytest.raises((TypeError, RuntimeError)) as caught:
        optimizer.step()
    assert_says(caught.value, "group 2")
