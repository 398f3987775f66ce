"""The head of a model: by name, by the model's own word, by running or tracing it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agc_triton import param_groups
from tests.model.test_param_groups import Net, unclipped
from tests.support.tensors import same

HEAD = {"fc.weight", "fc.bias"}


IMAGES = torch.zeros(2, 3, 5, 5)


@pytest.mark.parametrize("name", ["fc", "head", "classifier"])
def test_the_head_is_found_by_name(name: str) -> None:
    assert unclipped(Net(name)) == {f"{name}.weight", f"{name}.bias"}


def test_the_head_is_found_by_running_the_model() -> None:
    model = Net("readout").train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    found = unclipped(model, example_inputs=IMAGES)
    assert found == unclipped(model, example_inputs=(IMAGES,)) == {"readout.weight", "readout.bias"}
    # The run leaves no trace.
    assert same(dict(model.state_dict()), dict(before))
    assert [m.training for m in (model, model.stem, model.mix, model.norm)] == [True] * 3 + [False]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_head_is_found_by_tracing_the_model() -> None:
    assert unclipped(Net("readout")) == {"readout.weight", "readout.bias"}


def test_tracing_the_model_leaves_no_trace_in_it() -> None:
    class Counting(Net):
        mean: Tensor
        features: Any = None

        def __init__(self) -> None:
            super().__init__("readout")
            self.register_buffer("mean", torch.ones(6))
            self.calls = 0
            self.cache: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean.mul_(0.5)
            self.features = self.stem(x)
            self.cache.append(self.features)
            self.stem.latest = self.features
            return super().forward(x)

    model = Counting()
    before = copy.deepcopy(model.state_dict())
    params = list(map(id, model.parameters()))
    assert unclipped(model) == {"readout.weight", "readout.bias"}
    assert (model.calls, model.features, model.cache) == (0, None, [])
    assert not hasattr(model.stem, "latest")
    assert same(dict(model.state_dict()), dict(before))
    assert list(map(id, model.parameters())) == params


def test_a_model_that_cannot_be_copied_is_not_traced() -> None:
    model = Net("readout")
    model.lock = threading.Lock()  # type: ignore[assignment]  # what many a model holds
    with pytest.raises(ValueError, match="example_inputs"):
        param_groups(model)
    assert unclipped(model, example_inputs=IMAGES) == {"readout.weight", "readout.bias"}


@pytest.mark.parametrize("several", [list, tuple])
def test_the_models_own_word_on_its_head_comes_first(several: Any) -> None:
    class Timm(Net):
        def get_classifier(self) -> Any:
            return self.mix

    class Distilled(Net):
        def get_classifier(self) -> Any:
            return several([self.mix, self.fc])

    mix = {"mix.weight", "mix.bias"}
    assert unclipped(Timm(), example_inputs=IMAGES) == unclipped(Timm()) == mix
    assert unclipped(Distilled()) == mix | HEAD


def test_a_model_without_classifier_has_no_head() -> None:
    class Features(Net):
        def get_classifier(self) -> nn.Module:
            return nn.Identity()

    assert unclipped(Features()) == set()
    assert unclipped(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))) == set()


def test_the_last_two_parameters_are_not_the_head() -> None:
    names = [name for name, _ in Net().named_parameters()]
    assert not HEAD & set(names[-2:])
    assert unclipped(Net()) == HEAD


def test_a_head_that_cannot_be_told_is_an_error() -> None:
    class Dynamic(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() >= 0 else x

    with pytest.raises(ValueError, match=r"Dynamic.*mix.*example_inputs.*exclude_head=False"):
        param_groups(Dynamic("readout"))
    assert unclipped(Dynamic("readout"), exclude_head=False) == set()


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_the_head_is_found_inside_a_wrapped_model(wrap: Any) -> None:
    assert unclipped(wrap(Net())) == HEAD
