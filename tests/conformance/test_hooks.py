"""Hooks that act, and checkpoints that they put in order: as on torch.optim, on both paths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.conformance.pairs import every_class_on_both_paths, ours
from tests.support.checks import states_of
from tests.support.optimizers import PAIRS
from tests.support.places import KERNELS
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

SHAPES = ((6, 5), (6,))


def test_hooks_run_in_torchs_order() -> None:
    # Those of the class before those of an instance, prepended ones first, loads and saves too.
    def log_of(optimizer: Any, params: Sequence[Tensor]) -> list[str]:
        log: list[str] = []

        def note(what: str) -> Any:
            return lambda *_: log.append(what)

        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        optimizer.register_step_pre_hook(note("pre"))
        optimizer.register_step_post_hook(note("post"))
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre"):
            register = getattr(optimizer, f"register_{kind}_hook")
            register(note(kind))
            register(note(f"prepended {kind}"), prepend=True)
        optimizer.register_load_state_dict_post_hook(note("loaded"))
        try:
            train(optimizer, params, range(2))
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            for handle in handles:
                handle.remove()
        return log

    for cls in PAIRS:
        params = parameters(SHAPES)
        expected = log_of(cls(params), params)
        assert len(expected) == 15
        for backend in ("torch", "triton"):
            copies = KERNELS.weights(SHAPES)
            assert log_of(ours(cls, copies, backend), copies) == expected


@every_class_on_both_paths
def test_hooks_change_what_is_saved_and_loaded(cls: Any, backend: str) -> None:
    params, copied = KERNELS.weights(SHAPES), KERNELS.weights(SHAPES)
    optimizer, other = ours(cls, params, backend), ours(cls, copied, backend)

    def mark(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "written by": cls.__name__}

    def double_lr(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 2 * group["lr"]} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_state_dict_post_hook(mark)
    other.register_load_state_dict_pre_hook(double_lr)
    train(optimizer, params, range(1))
    train(other, copied, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["written by"] == cls.__name__
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.2
    optimizer.param_groups[0]["lr"] = 0.2
    train(optimizer, params, range(1, 3))
    train(other, copied, range(1, 3))
    assert same(params, copied)
    assert same(states_of(optimizer, params), states_of(other, copied))


@every_class_on_both_paths
def test_step_hooks_may_change_gradients_and_parameters(cls: Any, backend: str) -> None:
    params, copied = KERNELS.weights(SHAPES), KERNELS.weights(SHAPES)
    optimizer, other = ours(cls, params, backend), ours(cls, copied, backend)

    def negate(hooked: Any, *_: Any) -> None:
        for p in hooked.param_groups[0]["params"]:
            p.grad = -p.grad  # in new memory

    def shrink(hooked: Any, *_: Any) -> None:
        for p in hooked.param_groups[0]["params"]:
            p.data = p.data / 2

    optimizer.register_step_pre_hook(negate)
    optimizer.register_step_post_hook(shrink)
    train(optimizer, params, range(2))
    for seed in range(2):
        set_grads(copied, seed)
        for p in copied:
            assert p.grad is not None
            p.grad.neg_()
        other.step()
        for p in copied:
            p.div_(2)
    assert same(params, copied)
    assert same(states_of(optimizer, params), states_of(other, copied))


@every_class_on_both_paths
def test_a_checkpoint_of_parameters_in_another_order(cls: Any, backend: str) -> None:
    # torch's own recipe: a pre-hook that puts a checkpoint in order by its names.
    params, copied = KERNELS.weights(SHAPES), KERNELS.weights(SHAPES)
    optimizer = ours(cls, list(zip("ab", params, strict=True)), backend)
    other = ours(cls, list(zip("ba", copied[::-1], strict=True)), backend)

    def by_name(loading: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        (saved,), (group,) = state_dict["param_groups"], loading.param_groups
        place = dict(zip(saved["param_names"], saved["params"], strict=True))
        order = [place[name] for name in group["param_names"]]
        moved = {new: state_dict["state"][old] for new, old in enumerate(order)}
        named = {**saved, "param_names": group["param_names"]}
        return {"state": moved, "param_groups": [named]}

    other.register_load_state_dict_pre_hook(by_name)
    train(optimizer, params, range(2))
    with torch.no_grad():
        for p, value in zip(copied, params, strict=True):
            p.copy_(value)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == ["b", "a"]
    train(optimizer, params, range(2, 4))
    train(other, copied, range(2, 4))
    assert same(params, copied)
    assert same(states_of(optimizer, params), states_of(other, copied))
