"""The wrapper's groups, copies and checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW

from agc_triton import AGC, adaptive_clip_grad_
from tests.optim.test_wrapper import sgd
from tests.support.disk import on_disk
from tests.support.optimizers import PAIRS
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

CLIPPING = 0.02


def test_group_settings_come_before_the_wrappers() -> None:
    params = parameters([(4, 3)] * 4)
    groups: list[dict[str, Any]] = [
        {"params": params[:1]},
        {"params": params[1:2], "clipping": 0.5},
        {"params": params[2:3], "clipping": 0.0},
    ]
    base = SGD(groups, lr=1.0)
    wrapped = AGC(base, clipping=0.1, agc_eps=0.01, unit_dim=1)
    wrapped.add_param_group({"params": params[3:], "unit_dim": 0, "agc_eps": 100.0})
    expected = [(0.1, 0.01, 1), (0.5, 0.01, 1), (0.0, 0.01, 1), (0.1, 100.0, 0)]
    keys = ("clipping", "agc_eps", "unit_dim")
    assert [tuple(g[k] for k in keys) for g in base.param_groups] == expected
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, 1000.0)
    wrapped.step()
    moves = [b - p.detach() for b, p in zip(before, params, strict=True)]
    for i, clipping in ((0, 0.1), (1, 0.5)):
        limit = clipping * before[i].norm(dim=0)
        torch.testing.assert_close(moves[i].norm(dim=0), limit, rtol=1e-5, atol=1e-6)
    assert torch.equal(params[2].detach(), before[2] - 1000.0)
    torch.testing.assert_close(moves[3].norm(dim=1), torch.full((4,), 10.0), rtol=1e-5, atol=0)


def test_a_group_changed_between_steps_is_heeded() -> None:
    (param,) = parameters([(4, 3)])
    wrapped = AGC(SGD([param], lr=1.0), clipping=0.1)
    for clipping in (0.1, 0.5, None):
        wrapped.param_groups[0]["clipping"] = clipping
        before = param.detach().clone()
        param.grad = torch.full_like(param, 1000.0)
        wrapped.step()
        limit = torch.full((4,), 3e6**0.5) if clipping is None else clipping * before.norm(dim=1)
        moved = (before - param.detach()).norm(dim=1)
        torch.testing.assert_close(moved, limit, rtol=1e-4, atol=0)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    params, base = sgd()
    wrapped = AGC(base)
    wrapped.step()
    set_grads(params[:1], 0)
    wrapped.step()
    assert same(params[1:], parameters()[1:])
    assert set(wrapped.state) == {params[0]}


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("cls", [SGD, AdamW, Adagrad])
def test_copies_go_on_as_the_original(cls: Any, copier: Callable[[Any], Any]) -> None:
    params = parameters()
    groups = [{"params": params[:2], "clipping": 0.5}, {"params": params[2:]}]
    wrapped = AGC(cls(groups), clipping=CLIPPING, agc_eps=0.1, unit_dim=0)
    train(wrapped, params, range(2))
    params2, wrapped2 = copier((params, wrapped))
    assert type(wrapped2) is AGC
    assert type(wrapped2.optimizer) is cls
    assert wrapped2.optimizer is not wrapped.optimizer
    for optimizer, tensors in ((wrapped, params), (wrapped2, params2)):
        train(optimizer, tensors, range(2, 4))
    assert same(params, params2)
    assert same(wrapped.state_dict(), wrapped2.state_dict())


@pytest.mark.parametrize("through_base", [False, True])
@pytest.mark.parametrize("cls", PAIRS)
def test_a_plain_checkpoint_keeps_the_settings(cls: Any, through_base: bool) -> None:
    params = parameters()
    plain = cls(params, lr=0.05)
    train(plain, params, range(2))
    checkpoint = on_disk(plain.state_dict())

    ours = copy.deepcopy(params)
    groups = [{"params": ours, "clipping": 0.5}]
    wrapped = AGC(cls(groups, lr=9.0), clipping=CLIPPING, agc_eps=0.1, unit_dim=0)
    (wrapped.optimizer if through_base else wrapped).load_state_dict(checkpoint)
    for seed in (2, 3):
        set_grads(params, seed)
        adaptive_clip_grad_(params, clipping=0.5, agc_eps=0.1, unit_dim=0)
        plain.step()
    train(wrapped, ours, range(2, 4))
    (group,) = wrapped.param_groups
    settings = tuple(group[key] for key in ("lr", "clipping", "agc_eps", "unit_dim"))
    assert settings == (0.05, 0.5, 0.1, 0)
    assert same(ours, params)
    assert same(wrapped.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize("cls", PAIRS)
def test_its_checkpoints_load_into_the_plain_base_and_the_wrapper(cls: Any) -> None:
    params = parameters()
    wrapped = AGC(cls(params), clipping=CLIPPING)
    train(wrapped, params, range(2))
    plain_params, again_params = copy.deepcopy(params), copy.deepcopy(params)
    plain, again = cls(plain_params), AGC(cls(again_params), clipping=0.7)
    for loader in (plain, again):
        loader.load_state_dict(on_disk(wrapped.state_dict()))
    set_grads(plain_params, 2)
    adaptive_clip_grad_(plain_params, clipping=CLIPPING)
    plain.step()
    train(wrapped, params, range(2, 3))
    train(again, again_params, range(2, 3))
    assert same(params, plain_params)
    assert same(params, again_params)


@pytest.mark.parametrize("cls", PAIRS)
def test_agrees_with_the_class_of_the_same_name(cls: Any) -> None:
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    wrapped, fused = AGC(cls(ours), clipping=CLIPPING), PAIRS[cls](theirs, clipping=CLIPPING)
    for seed in range(4):
        train(wrapped, ours, range(seed, seed + 1))
        train(fused, theirs, range(seed, seed + 1))
        torch.testing.assert_close(ours, theirs)


def test_repr_shows_the_base_with_the_settings() -> None:
    _, base = sgd()
    text = repr(AGC(base, clipping=0.25))
    assert text.startswith("AGC(SGD (")
    assert "clipping: 0.25" in text
