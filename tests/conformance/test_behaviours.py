"""What PyTorch tests of its own optimizers beyond numbers: hooks that act, old and odd checkpoints.

Both paths beside torch.optim; that each hook fires at all is in test_features.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing._internal.common_optimizers import optim_db

from tests.conformance.pairs import STATE, every_class_on_both_paths, ours
from tests.support.checks import states_of
from tests.support.optimizers import PAIRS
from tests.support.places import DEVICE, KERNELS
from tests.support.soak import soaked
from tests.support.tensors import same
from tests.support.training import train

SHAPES = ((6, 5), (6,))


LATER_FLAGS = {info.optim_cls: info.not_og_supported_flags for info in optim_db}


@every_class_on_both_paths
def test_pickles_from_before_an_option_existed(cls: Any, backend: str) -> None:
    later = {*LATER_FLAGS[cls], "fused", "capturable", "differentiable", "foreach", "maximize"}
    params = KERNELS.weights(SHAPES)
    optimizer = ours(cls, params, backend, clipping=0.05)
    train(optimizer, params, range(2))
    old_params, old = copy.deepcopy((params, optimizer))
    for group in old.param_groups:
        for flag in later & group.keys():
            del group[flag]
    old_params, old = pickle.loads(pickle.dumps((old_params, old)))
    (group,), (expected,) = old.param_groups, optimizer.param_groups
    assert {**group, "params": None} == {**expected, "params": None}
    train(optimizer, params, range(2, 4))
    train(old, old_params, range(2, 4))
    assert same(params, old_params)
    assert same(states_of(optimizer, params), states_of(old, old_params))


@every_class_on_both_paths
def test_averages_of_a_model_and_their_learning_rate(cls: Any, backend: str) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1))
    start = start.to(DEVICE, torch.float64)
    data = torch.randn(8, 4, device=DEVICE, dtype=torch.float64)
    decaying: Any = get_ema_multi_avg_fn  # untyped

    def averages(make: Any) -> list[Any]:
        model = copy.deepcopy(start)
        optimizer = make(model.parameters())
        swa: Any = AveragedModel(model)
        ema: Any = AveragedModel(model, multi_avg_fn=decaying(0.5))
        scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for _ in range(4):
            optimizer.zero_grad()
            (model(data) ** 2).mean().backward()
            optimizer.step()
            swa.update_parameters(model)
            ema.update_parameters(model)
            scheduler.step()
        update_bn([data], swa)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
        return [*swa.state_dict().values(), *ema.state_dict().values()]

    expected = averages(lambda params: cls(params, **STATE[cls]))
    actual = averages(lambda params: ours(cls, params, backend, clipping=1e6))
    # Nothing is clipped; scalars are rounded differently.
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("cls", soaked(PAIRS, lambda cls: cls in (SGD, AdamW)))
def test_a_compiled_training_step_on_the_triton_path(cls: Any) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(DEVICE)
    inputs = torch.randn(5, 4, device=DEVICE)

    def run(compiled: bool) -> list[Any]:
        model = copy.deepcopy(start)
        optimizer = ours(cls, model.parameters(), "triton")

        def training_step() -> None:
            optimizer.zero_grad()
            (model(inputs) ** 2).sum().backward()
            optimizer.step()

        step = torch.compile(training_step, backend="eager") if compiled else training_step
        for _ in range(3):
            step()
        return [*model.parameters(), *states_of(optimizer, list(model.parameters()))]

    assert same(run(compiled=True), run(compiled=False))


@every_class_on_both_paths
def test_a_backward_pass_over_weights_that_have_changed_raises(cls: Any, backend: str) -> None:
    # As after torch.optim's own steps but the fused ones; silently wrong otherwise.
    params = [p.requires_grad_() for p in KERNELS.weights(SHAPES)]
    optimizer = ours(cls, params, backend)
    for _ in range(2):
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        torch.autograd.backward(loss, retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)
