"""suggest_clipping leaves all as it was, also where a batch raises."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agc_triton import AdamW_AGC, param_groups, suggest_clipping
from tests.support.places import DEVICE
from tests.support.tensors import bits, same


class Restless(nn.Module):
    """Changes what it can in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Linear(4, 8).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("shared", torch.full((1, 3), 0.5).expand(2, 3))
        with torch.inference_mode():
            self.register_buffer("made_in_inference", torch.tensor([torch.nan, -0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        with torch.no_grad():
            self.head.bias.clamp_(max=-1.0)
            self.frozen.weight.data.neg_()
        self.body[1].eval()
        self.frozen.requires_grad_(True)
        noise = random.random() + np.random.rand() + torch.rand(x.shape, device=x.device)
        out: Tensor = self.head(self.body(x + noise) + self.frozen(x))
        return out


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


class Training:
    """A model after a step with an optimizer, with gradients for some of its parameters."""

    def __init__(self) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        self.model = Restless().to(DEVICE)
        self.optimizer = AdamW_AGC(param_groups(self.model), lr=0.1)
        loss: Any = loss_fn(self.model, next(self.batches(1)))
        loss.backward()
        self.optimizer.step()
        self.model.head.weight.grad = None
        self.model.body[0].eval()
        self.model.body[1].train()
        self.model.frozen.requires_grad_(False)
        for tensor in self.model.parameters():
            tensor.data[0] = -0.0

    def batches(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(n):
            yield torch.randn(16, 4, device=DEVICE), torch.arange(16, device=DEVICE) % 3

    def kept(self) -> tuple[Any, ...]:
        """All there is, with tensors as their bytes and by their identity."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        objects = [*tensors.values(), *grads.values(), *self.optimizer.param_groups]
        return (
            {name: bits(tensor) for name, tensor in tensors.items()},
            {name: None if grad is None else bits(grad) for name, grad in grads.items()},
            [id(one) for one in objects],
            [(name, p.requires_grad) for name, p in self.model.named_parameters()],
            [(name, module.training) for name, module in self.model.named_modules()],
            copy.deepcopy(self.optimizer.state_dict()),
            random.getstate(),
            [str(part) for part in np.random.get_state(legacy=False).items()],
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if DEVICE == "cuda" else [],
        )


def after(training: Training, batches: Any, loss: Any = loss_fn) -> None:
    suggest_clipping(training.model, loss, batches, training.optimizer)


def test_the_model_does_change_what_is_looked_at() -> None:
    training = Training()
    before = training.kept()
    loss: Any = loss_fn(training.model, next(training.batches(1)))
    loss.backward()
    alike = [same(*pair) for pair in zip(before, training.kept(), strict=True)]
    assert alike == [False] * 5 + [True] + [False] * 3 + [DEVICE == "cpu"]


def test_all_is_as_it_was() -> None:
    training = Training()
    before = training.kept()
    after(training, training.batches(3))
    for was, now in zip(before, training.kept(), strict=True):
        assert same(was, now)


def test_training_goes_on_as_if_it_had_not_been_called() -> None:
    weights = []
    for looked in (False, True):
        training = Training()
        if looked:
            after(training, training.batches(3))
        for _ in range(2):
            loss: Any = loss_fn(training.model, next(training.batches(1)))
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
        weights.append([p.detach() for p in training.model.parameters()])
    assert same(*weights)


@pytest.mark.parametrize("where", ["loss", "batches", "backward"])
def test_all_is_as_it_was_where_a_batch_raises(where: str) -> None:
    training = Training()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from training.batches(2)
        if where == "batches":
            raise KeyError("broken file")
        yield from training.batches(1)

    calls: list[None] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(None)
        found = loss_fn(model, batch)
        if len(calls) == 3 and where == "loss":
            raise KeyError("broken label")
        return torch.stack([found, found]) if len(calls) == 3 else found

    before = training.kept()
    with pytest.raises(ValueError if where == "backward" else KeyError):
        after(training, batches(), loss)
    for was, now in zip(before, training.kept(), strict=True):
        assert same(was, now)


def test_a_backward_pass_that_was_begun_can_go_on() -> None:
    training = Training()
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).to(DEVICE)
    first, second = training.batches(2)
    pending: Any = loss_fn(model, first)
    suggest_clipping(model, loss_fn, [second])
    pending.backward()  # refuses weights that have been written to
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_may_be_switched_off_around_it() -> None:
    training = Training()
    with torch.no_grad():
        after(training, training.batches(1))
        assert not torch.is_grad_enabled()
