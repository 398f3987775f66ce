"""What torch's own tools do with a torch.optim class, they do with the AGC classes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import AveragedModel

from agc_triton import AGC, SGD_AGC, AdamW_AGC
from agc_triton.optim import OPTIMIZERS
from tests.support.checks import clipped
from tests.support.optimizers import OURS, PAIRS, takes_more_later
from tests.support.soak import soaked
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

CLIPPING = 0.02


def wrapped_sgd(
    params: Any, clipping: float = CLIPPING, unit_dim: int | None = None, **options: Any
) -> AGC:
    return AGC(SGD(params, **options), clipping=clipping, unit_dim=unit_dim)


every_optimizer = pytest.mark.parametrize("make", [*OURS, wrapped_sgd])


@pytest.mark.parametrize(
    "register",
    [
        "register_step_pre_hook",
        "register_step_post_hook",
        "register_state_dict_pre_hook",
        "register_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
@every_optimizer
def test_hooks_fire_once_until_they_are_removed(make: Any, register: str) -> None:
    params = parameters()
    optimizer = make(params)
    calls: list[Any] = []
    handle = getattr(optimizer, register)(lambda *args: calls.append(args[0]))

    def use() -> None:
        train(optimizer, params, range(1))
        optimizer.load_state_dict(optimizer.state_dict())

    use()
    handle.remove()
    use()
    assert len(calls) == 1
    assert calls[0] in (optimizer, getattr(optimizer, "optimizer", optimizer))


@every_optimizer
def test_global_step_hooks_fire_once_per_step(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        train(optimizer, params, range(2))
    finally:
        for handle in handles:
            handle.remove()
    train(optimizer, params, range(1))
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("make", [SGD_AGC, wrapped_sgd])
def test_gradients_are_clipped_after_the_pre_hooks_changed_them(
    make: Any, with_closure: bool
) -> None:
    # One that sums gradients over ranks, say, or adds noise to them.
    (param,) = parameters([(4, 3)])
    optimizer = make([param], lr=1.0, clipping=CLIPPING)

    def scale_up(*_: Any) -> None:
        param.grad = torch.full_like(param, 1e4)

    optimizer.register_step_pre_hook(scale_up)
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step((lambda: 0.0) if with_closure else None)
    moved = (param.detach() - before).norm(dim=1)
    torch.testing.assert_close(moved, CLIPPING * before.norm(dim=1), rtol=1e-4, atol=0)


@every_optimizer
def test_the_closure_runs_once_with_grad_and_its_loss_comes_back(make: Any) -> None:
    (param,) = parameters([(4, 3)])
    optimizer = make([param])
    losses: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append((param**2).sum())
        torch.autograd.backward(losses[-1])
        return losses[-1]

    before = param.detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(losses) == 1
    assert loss is losses[0]
    assert not torch.equal(param, before)


@pytest.mark.parametrize("cls", PAIRS)
def test_groups_added_in_mid_training(cls: Any) -> None:
    if not takes_more_later(cls.__name__):
        pytest.skip("torch's class does not")
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    optimizer, expected = PAIRS[cls](ours[:1], clipping=CLIPPING), cls(theirs[:1])
    for seed in range(4):
        if seed == 2:
            optimizer.add_param_group({"params": ours[1:3], "lr": 0.2, "clipping": 0.5})
            optimizer.add_param_group({"params": ours[3:]})
            expected.add_param_group({"params": theirs[1:3], "lr": 0.2})
            expected.add_param_group({"params": theirs[3:]})
        train(optimizer, ours, range(seed, seed + 1))
        set_grads(theirs, seed)
        for i, p in enumerate(theirs):
            assert p.grad is not None
            p.grad = clipped(p.detach(), p.grad, 0.5 if i in (1, 2) else CLIPPING)
        expected.step()
    assert [group["clipping"] for group in optimizer.param_groups] == [CLIPPING, 0.5, CLIPPING]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@every_optimizer
def test_named_parameters(make: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    names = [name for name, _ in model.named_parameters()]
    assert make(model.named_parameters()).param_groups[0]["param_names"] == names
    optimizer = make([{"params": model[0].named_parameters(), "clipping": 0.5}])
    optimizer.add_param_group({"params": model[1].named_parameters()})
    train(optimizer, list(model.parameters()), range(2))
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight", "bias"]] * 2


# Older versions of torch warn of every lazy module.
lazy = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")


@lazy
@every_optimizer
def test_uninitialized_parameters(make: Any) -> None:
    def run(initialized: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3) if initialized else nn.LazyLinear(3), nn.Linear(3, 2))
        optimizer = make(model[1].parameters())
        optimizer.add_param_group({"params": list(model[0].parameters())})
        optimizer.step()  # no gradient yet
        model(torch.ones(2, 4))
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        train(optimizer, list(model.parameters()), range(2))
        return [p.detach() for p in model.parameters()]

    assert same(run(initialized=False), run(initialized=True))


@lazy
@pytest.mark.parametrize(
    "make", [make for make in (*OURS, wrapped_sgd) if make is not OPTIMIZERS["Adagrad"]]
)
def test_an_uninitialized_parameter_is_checked_at_its_first_gradient(make: Any) -> None:
    module = nn.LazyLinear(3)
    optimizer = make(module.parameters(), unit_dim=2)
    optimizer.step()
    module(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"unit_dim 2 .*parameter 0 of group 0"):
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@every_optimizer
def test_zero_grad(make: Any, set_to_none: bool) -> None:
    params = parameters()
    optimizer = make(params)
    set_grads(params, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in params:
        assert same(p.grad, None if set_to_none else torch.zeros_like(p))
    optimizer.step()
    # Adagrad's states are there from the start.
    assert not (set_to_none and optimizer.state) or isinstance(optimizer, Adagrad)


@pytest.mark.parametrize("cls", OURS)
def test_repr_shows_the_options_of_each_group(cls: Any) -> None:
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:], "clipping": 0.125, "unit_dim": 1}]
    text = repr(cls(groups, clipping=0.25, agc_eps=0.5))
    assert text.startswith(f"{cls.__name__} (\nParameter Group 0\n")
    first, second = text.split("Parameter Group 1")
    for line in ("clipping: 0.25", "agc_eps: 0.5", "unit_dim: None"):
        assert line in first
    for line in ("clipping: 0.125", "agc_eps: 0.5", "unit_dim: 1"):
        assert line in second


@every_optimizer
def test_averaged_models_take_the_trained_weights(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    averaged: Any = AveragedModel(model)
    optimizer = make(model.parameters())
    seen = []
    for seed in range(3):
        train(optimizer, list(model.parameters()), range(seed, seed + 1))
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    assert not same(seen[0], seen[-1])
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(seen).mean(0))


# dynamo looks into torch.optim.SGD, the wrapper's base, and imports torch's scripted classes.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "make", soaked([*OURS, wrapped_sgd], lambda make: make in (SGD_AGC, AdamW_AGC, wrapped_sgd))
)
def test_a_compiled_training_step_gives_the_same_numbers(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    inputs = torch.randn(5, 4)

    def run(compiled: bool) -> Any:
        net = copy.deepcopy(model)
        optimizer = make(net.parameters(), lr=0.1)

        def training_step() -> None:
            optimizer.zero_grad()
            torch.autograd.backward((net(inputs) ** 2).sum())
            optimizer.step()

        step = torch.compile(training_step, backend="eager") if compiled else training_step
        for _ in range(3):
            step()
        return list(net.parameters())

    assert same(run(compiled=True), run(compiled=False))


def without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


@pytest.mark.parametrize("cls", PAIRS)
def test_the_signature_is_torchs_and_then_ours(cls: Any) -> None:
    theirs = list(inspect.signature(cls).parameters.values())
    ours = list(inspect.signature(PAIRS[cls]).parameters.values())
    assert ours[: len(theirs)] == theirs
    added = {p.name: p.default for p in ours[len(theirs) :]}
    agc = {"clipping": 1e-2, "agc_eps": 1e-3, "unit_dim": None}
    whole = {"backend": "auto", "nonfinite": "propagate", "track_clipping": 0}
    assert added == {**agc, **whole}
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (SGD, (0.1, 0.9, 0.0, 0.01, True)),
        (Adam, (0.1, (0.8, 0.9), 1e-6, 0.01, True)),
        (AdamW, (0.1, (0.8, 0.9), 1e-6, 0.02, True)),
        (RMSprop, (0.1, 0.8, 1e-6, 0.01, 0.9, True)),
        (Adagrad, (0.1, 0.2, 0.01, 0.3, 1e-6)),
        (ASGD, (0.1, 1e-3, 0.5, 10.0, 0.01)),
    ],
)
def test_positional_arguments_are_torchs(cls: Any, arguments: tuple[Any, ...]) -> None:
    ours, theirs = PAIRS[cls](parameters(), *arguments), cls(parameters(), *arguments)
    (group,), (expected,) = ours.param_groups, theirs.param_groups
    assert without_params({k: group[k] for k in expected}) == without_params(expected)
    assert isinstance(ours, cls)
