"""States that have not their parameter's shape any more are refused, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.checks import nothing_changes
from tests.support.optimizers import EACH_WAY, STATEFUL, build
from tests.support.tensors import parameters, set_grads
from tests.support.training import train

pytestmark = pytest.mark.usefixtures("small_blocks")


def grown(param: Any) -> None:
    param.data = torch.cat([param.detach(), param.detach()])


def shrunk(param: Any) -> None:
    param.data = param.detach()[:-1].clone()


def reshaped(param: Any) -> None:
    param.data = param.detach().view(-1, 2)


@pytest.mark.parametrize("change", [grown, shrunk, reshaped])
@pytest.mark.parametrize("mode", ["default", "foreach"])
@pytest.mark.parametrize("name", EACH_WAY)
def test_states_of_another_shape_are_refused_before_anything_changes(
    name: str, mode: str, change: Callable[[Any], None]
) -> None:
    def trained(make: Any) -> tuple[list[Any], Any]:
        params = parameters([(4, 3), (6, 5)])
        optimizer = make([{"params": [p]} for p in params])
        train(optimizer, params, range(2))
        change(params[1])
        set_grads(params, 2)
        return params, optimizer

    _, theirs = trained(lambda groups: getattr(torch.optim, name)(groups, **STATEFUL[name]))
    with pytest.raises(RuntimeError):
        theirs.step()
    params, ours = trained(lambda groups: build(name, groups, STATEFUL[name], mode))
    with nothing_changes(params, ours), pytest.raises(RuntimeError, match="shape") as caught:
        ours.step()
    assert f"parameter 0 of group 1, shape {tuple(params[1].shape)}" in str(caught.value)
    del ours.state[params[1]]
    train(ours, params, range(2, 4))


@pytest.mark.parametrize("name", EACH_WAY)
def test_a_state_replaced_by_one_of_another_shape_is_refused(name: str) -> None:
    params = parameters([(4, 3), (6, 5)])
    optimizer = build(name, [{"params": [p]} for p in params], STATEFUL[name])
    train(optimizer, params, range(2))
    set_grads(params, 2)
    for key, value in optimizer.state[params[1]].items():
        if key != "step":
            optimizer.state[params[1]][key] = value.flatten()[:7].clone()
    with nothing_changes(params, optimizer), pytest.raises(RuntimeError, match="shape"):
        optimizer.step()
