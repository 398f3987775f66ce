"""Plans are refreshed when parameters, states or gradients lie otherwise in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.support.checks import states_of
from tests.support.guards import Guarded
from tests.support.optimizers import ADAMW, CLIPPING
from tests.support.places import DEVICE, few_weights
from tests.support.plans import tile_shapes
from tests.support.tensors import moved, same, unaligned, weight
from tests.support.training import Training

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


@BACKENDS
def test_parameters_move_to_other_memory(backend: str) -> None:
    training = Training("AdamW", few_weights(), **ADAMW, backend=backend)
    training.train()
    left = [p.detach() for p in training.params]
    values = copy.deepcopy(left)
    for p in training.params:
        p.data = moved(p)
    training.train()
    assert same(left, values)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": torch.t,
    "reshaped": lambda t: t.view(2, 8),
    "flattened": lambda t: t.view(-1),
}


@BACKENDS
def test_parameters_are_transposed_and_nothing_else(backend: str) -> None:
    training = Training("SGD", [weight((4, 4), device=DEVICE)], lr=0.5, backend=backend)
    training.train()
    (param,) = training.params
    param.data = param.data.t()
    training.step()


@BACKENDS
def test_a_parameter_narrowed_where_it_is_leaves_the_rest_alone(backend: str) -> None:
    training = Training("SGD", [weight((4, 4), device=DEVICE)], lr=0.5, backend=backend)
    training.train()
    (param,) = training.params
    whole, before = param.data, param.detach().clone()
    param.data = whole[:2]  # the same address and strides, and the gradient as it was
    with pytest.raises(RuntimeError, match=r"4, 4.*2, 4"):
        training.optimizer.step()
    assert torch.equal(whole, before)


@BACKENDS
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("view", VIEWS)
def test_parameters_change_shape_where_they_are(backend: str, name: str, view: str) -> None:
    training = Training(name, [weight((4, 4), device=DEVICE)], lr=0.5, backend=backend)
    training.train()
    (param,) = training.params
    assert param.grad is not None
    grad, param.grad = param.grad, None
    param.data = VIEWS[view](param.data)
    param.grad = VIEWS[view](grad)
    for state in states_of(training.optimizer, [param]):
        state.update({key: VIEWS[view](x) for key, x in state.items() if key != "step"})
    training.step()


def test_parameters_change_dtype_where_they_are() -> None:
    training = Training("SGD", few_weights(torch.float16), lr=0.5)
    training.train()
    for p in training.params:
        assert p.grad is not None
        grad, p.grad = p.grad, None
        values, grads = p.to(torch.bfloat16), grad.to(torch.bfloat16)
        p.data = p.data.view(torch.bfloat16).copy_(values)
        p.grad = grads  # of another dtype, so another tensor
    training.step()


@BACKENDS
def test_parameters_are_frozen_and_thawed(backend: str) -> None:
    training = Training(
        "AdamW",
        [Parameter(p) for p in few_weights()],
        **ADAMW,
        backend=backend,
    )
    training.train()
    training.params[1].requires_grad_(False)
    before = training.params[1].detach().clone()
    training.move_grads(without=[1])
    training.step()
    assert torch.equal(training.params[1], before)
    training.params[1].requires_grad_(True)
    training.train()


@pytest.mark.parametrize("clipping", [0, CLIPPING])
def test_gradients_of_another_shape_are_refused(clipping: float) -> None:
    training = Training("AdamW", few_weights(), **ADAMW, clipping=clipping)
    training.train()
    param = training.params[0]
    assert param.grad is not None
    param.grad = Guarded(param.grad).tensor
    param.data = weight((6, 20), device=DEVICE)
    training.optimizer.state.pop(param)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"shape|size"):
        training.optimizer.step()
    assert torch.equal(param, before)


def vectors(training: Training) -> set[int]:
    return {shape.vector for shape in tile_shapes(training.optimizer)}


def test_gradients_lose_and_regain_alignment() -> None:
    training = Training("AdamW", few_weights()[::2], **ADAMW)
    training.train()
    assert vectors(training) == {4}
    training.move_grads(place=unaligned)
    training.step()
    assert vectors(training) == {1}
    training.train()


def test_parameters_and_states_lose_alignment() -> None:
    training = Training("AdamW", few_weights()[::2], **ADAMW)
    training.train()
    for p in training.params:
        p.data = unaligned(p.data)
    training.train()
    assert vectors(training) == {1}
    for p in training.params:
        p.data = moved(p)
    training.train()
    assert vectors(training) == {4}
    for p in training.params:
        training.optimizer.state[p]["exp_avg"] = unaligned(training.optimizer.state[p]["exp_avg"])
    training.train()
    assert vectors(training) == {1}


@BACKENDS
def test_gradients_change_layout(backend: str) -> None:
    param = weight((4, 3, 2, 2), device=DEVICE)
    training = Training("AdamW", [param], **ADAMW, backend=backend)
    training.train()
    for layout in (torch.channels_last, torch.contiguous_format):
        training.move_grads(place=partial(torch.clone, memory_format=layout))
        training.step()
    param.data = param.data.to(memory_format=torch.channels_last)
    training.train()
