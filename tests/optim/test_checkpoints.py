"""Checkpoints go between torch.optim and the AGC classes at any step; copies go on as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Optimizer

from agc_triton import adaptive_clip_grad_
from tests.support.disk import on_disk
from tests.support.optimizers import NAMES, OURS, PAIRS, STATEFUL, TORCHS, takes
from tests.support.soak import soaked
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

CLIPPING = 0.02
AGC_KEYS = ("clipping", "agc_eps", "unit_dim")

# In float64: torch's own implementations round a float32 one differently.
LR = torch.tensor(0.01, dtype=torch.float64)

# What torch's own implementations are told apart by, beside the defaults and every state.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.9, "weight_decay": 0.1, "fused": True},
        {"momentum": 0.9, "nesterov": True, "foreach": True},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    ],
    "Adam": [
        {"amsgrad": True, "weight_decay": 0.1, "fused": True},
        {"foreach": True, "maximize": True},
        {"lr": LR, "decoupled_weight_decay": True, "fused": True},
        {"amsgrad": True, "foreach": False},
    ],
    "AdamW": [
        {"fused": True},
        {"amsgrad": True, "foreach": True},
        {"lr": LR, "betas": (0.8, 0.9)},
    ],
    "RMSprop": [
        {"momentum": 0.9, "weight_decay": 0.1, "foreach": True},
        {"momentum": 0.9, "centered": True},
    ],
    "Adagrad": [{"fused": True, "lr_decay": 0.1}, {"initial_accumulator_value": 0.1}],
}
CASES = [
    (TORCHS[name], options)
    for name in NAMES
    for options in [{}, *OPTIONS.get(name, [{**STATEFUL[name], "lr": LR, "foreach": True}])]
    if takes(name, *options)
]


every_option = pytest.mark.parametrize(
    ("cls", "options"), CASES, ids=[f"{cls.__name__}-{options}" for cls, options in CASES]
)


def move(optimizer: Optimizer, params: list[Parameter], cls: Any, **options: Any) -> Any:
    """Another optimizer of class ``cls`` that goes on from a checkpoint, on copied parameters."""
    copied = [Parameter(p) for p in on_disk([p.detach() for p in params])]
    other = cls(copied, **options)
    other.load_state_dict(on_disk(optimizer.state_dict()))
    return other, copied


@pytest.mark.parametrize("before", [0, 2])
@every_option
def test_resuming_does_not_change_a_bit(cls: Any, options: dict[str, Any], before: int) -> None:
    params = parameters()
    optimizer = PAIRS[cls](params, clipping=CLIPPING, agc_eps=0.01, **options)
    train(optimizer, params, range(before))
    resumed, copied = move(optimizer, params, PAIRS[cls])
    assert same(optimizer.state_dict(), resumed.state_dict())
    train(resumed, copied, range(before, before + 2))
    train(optimizer, params, range(before, before + 2))
    assert same(copied, params)
    assert same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("before", soaked((0, 1, 3), lambda before: before != 3))
@every_option
def test_a_torch_run_goes_on_with_agc(cls: Any, options: dict[str, Any], before: int) -> None:
    params = parameters()
    theirs = cls(params, **options)
    train(theirs, params, range(before))
    ours, copied = move(theirs, params, PAIRS[cls], clipping=None)
    train(ours, copied, range(before, before + 2))
    train(theirs, params, range(before, before + 2))
    assert same(copied, params)
    assert same(ours.state_dict()["state"], theirs.state_dict()["state"])


@pytest.mark.parametrize("before", soaked((0, 1, 3), lambda before: before != 3))
@every_option
def test_an_agc_run_goes_on_with_torch(cls: Any, options: dict[str, Any], before: int) -> None:
    params = parameters()
    ours = PAIRS[cls](params, clipping=0, **options)
    train(ours, params, range(before))
    theirs, copied = move(ours, params, cls)
    train(theirs, copied, range(before, before + 2))
    train(ours, params, range(before, before + 2))
    assert same(copied, params)
    assert same(theirs.state_dict(), ours.state_dict())


@every_option
def test_to_torch_and_back_while_clipping(cls: Any, options: dict[str, Any]) -> None:
    params = parameters(dtype=torch.float64)
    optimizer: Any = PAIRS[cls](params, clipping=CLIPPING, **options)
    torchs_params = parameters(dtype=torch.float64)
    torchs = cls(torchs_params, **options)
    for seed in range(5):
        set_grads(torchs_params, seed)
        adaptive_clip_grad_(torchs_params, clipping=CLIPPING)
        torchs.step()
        set_grads(params, seed)
        if type(optimizer) is cls:
            adaptive_clip_grad_(params, clipping=CLIPPING)
        optimizer.step()
        other = PAIRS[cls] if type(optimizer) is cls else cls
        optimizer, params = move(optimizer, params, other)
    # The two take the same state through different kernels: equal up to rounding. What is kept in
    # fp32, as eta, torch's load_state_dict gives the parameter's dtype.
    closeness: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
    if len(PAIRS[cls].rule.kernel.scalars) > 1:
        closeness = {"rtol": 1e-6, "atol": 1e-7, "check_dtype": False}
    torch.testing.assert_close(params, torchs_params, **closeness)
    ours, theirs = optimizer.state_dict()["state"], torchs.state_dict()["state"]
    torch.testing.assert_close(ours, theirs, **closeness)


@every_option
@pytest.mark.parametrize("clipping", [CLIPPING, 0])
def test_state_and_group_keys_are_torchs_after_each_step(
    cls: Any, options: dict[str, Any], clipping: float
) -> None:
    def kinds(optimizer: Optimizer) -> Any:
        state = optimizer.state_dict()["state"]
        return {
            i: {k: (type(v), v.dtype, v.shape, v.stride(), v.device) for k, v in entry.items()}
            for i, entry in state.items()
        }

    ours_params, theirs_params = parameters(), parameters()
    ours = PAIRS[cls](ours_params, clipping=clipping, **options)
    theirs = cls(theirs_params, **options)
    assert kinds(ours) == kinds(theirs)
    assert (kinds(ours) == {}) is (cls is not Adagrad)  # whose states are there from the start
    for seed in range(3):
        # The last parameter gets its first gradient late, which torch's fused SGD cannot take.
        late = seed == 0 and not (cls is SGD and options.get("fused"))
        last = len(ours_params) - late
        train(ours, ours_params[:last], range(seed, seed + 1))
        train(theirs, theirs_params[:last], range(seed, seed + 1))
        assert kinds(ours) == kinds(theirs)
        (group,) = ours.state_dict()["param_groups"]
        shared = {key: value for key, value in group.items() if key not in AGC_KEYS}
        assert same([shared], theirs.state_dict()["param_groups"])


@pytest.mark.parametrize("cls", PAIRS)
def test_a_torch_checkpoint_keeps_each_groups_agc_options(cls: Any) -> None:
    params = parameters()
    theirs = cls([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], lr=0.25)
    train(theirs, params, range(1))
    groups = [{"params": params[:2], "clipping": 0.5, "unit_dim": 1}, {"params": params[2:]}]
    ours = PAIRS[cls](groups, lr=9.0, clipping=0.03, agc_eps=0.1)
    ours.load_state_dict(on_disk(theirs.state_dict()))
    keys = ("lr", *AGC_KEYS)
    loaded = [tuple(group[key] for key in keys) for group in ours.param_groups]
    assert loaded == [(0.5, 0.5, 0.1, 1), (0.25, 0.03, 0.1, None)]
    train(ours, params, range(1, 2))


@pytest.mark.parametrize("cls", OURS)
def test_its_own_checkpoint_brings_its_agc_options(cls: Any) -> None:
    params = parameters()
    saved = cls([{"params": params[:1], "clipping": None}, {"params": params[1:]}], clipping=0.5)
    other = cls([{"params": params[:1]}, {"params": params[1:]}], clipping=0.1, agc_eps=7.0)
    other.load_state_dict(on_disk(saved.state_dict()))
    loaded = [tuple(group[key] for key in AGC_KEYS) for group in other.param_groups]
    assert loaded == [(None, 1e-3, None), (0.5, 1e-3, None)]
    # Groups added later get what the constructor said.
    other.add_param_group({"params": parameters(seed=1)})
    assert (other.param_groups[2]["clipping"], other.param_groups[2]["agc_eps"]) == (0.1, 7.0)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@every_option
def test_copies_go_on_as_the_original(
    cls: Any, options: dict[str, Any], copier: Callable[[Any], Any]
) -> None:
    params = parameters()
    groups = [{"params": params[:2], "clipping": 0.5}, {"params": params[2:]}]
    optimizer = PAIRS[cls](groups, clipping=CLIPPING, backend="torch", **options)
    train(optimizer, params, range(2))
    copied, other = copier((params, optimizer))
    assert type(other) is type(optimizer)
    assert other.backend == "torch"
    assert same(optimizer.state_dict(), other.state_dict())
    for each, tensors in ((optimizer, params), (other, copied)):
        train(each, tensors, range(2, 4))
        each.add_param_group({"params": parameters([(3, 2)], seed=7)})
    assert same(params, copied)
    assert same(optimizer.state_dict(), other.state_dict())
    assert same(optimizer.defaults, other.defaults)


@pytest.mark.parametrize("cls", PAIRS)
def test_copied_optimizers_leave_each_other_alone(cls: Any) -> None:
    params = parameters()
    optimizer = PAIRS[cls](params)
    train(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    copied, other = copy.deepcopy((params, optimizer))
    train(other, copied, range(1, 3))
    other.param_groups[0]["clipping"] = 0.7
    assert same(optimizer.state_dict(), before)
