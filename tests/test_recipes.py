"""The recipes of docs/integrations.md that need no other package run and train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from agc_triton import AdamW_AGC, param_groups
from tests.support.bases import SAM, Lookahead
from tests.support.places import DEVICE
from tests.support.recipes import batches_of, loss_of, network, run_recipe
from tests.support.tensors import same

BATCHES = batches_of(8, DEVICE)


@pytest.mark.parametrize("heading", ["SAM", "Lookahead", "Averages of weights: EMA and SWA"])
def test_it_trains(heading: str) -> None:
    model = network(DEVICE)
    before = loss_of(model, BATCHES)
    names = run_recipe(heading, model=model, batches=BATCHES, SAM=SAM, Lookahead=Lookahead)
    assert loss_of(model, BATCHES) < before
    for average in ("ema", "swa"):
        if average in names:
            assert loss_of(names[average], BATCHES) < before


def test_the_head_is_left_unclipped() -> None:
    names = run_recipe("SAM", model=network(DEVICE), batches=BATCHES, SAM=SAM)
    model, groups = names["model"], names["optimizer"].param_groups
    unclipped = {id(p) for group in groups if group["clipping"] == 0 for p in group["params"]}
    assert unclipped == {id(p) for p in model[3].parameters()}
    assert {group["clipping"] for group in groups} == {0.0, 0.02}


def test_the_lr_finder_leaves_everything_as_it_was() -> None:
    model = network(DEVICE)
    before = copy.deepcopy(model.state_dict())
    names = run_recipe("LR finder", model=model, batches=BATCHES)
    assert len(names["losses"]) == len(names["rates"]) == 20
    assert same(dict(model.state_dict()), dict(before))
    assert not names["optimizer"].state
    assert {group["lr"] for group in names["optimizer"].param_groups} == {0.1}


def test_steps_in_backward_are_those_of_the_usual_loop() -> None:
    model: Any = network(DEVICE)
    names = run_recipe("Optimizer in backward", model=model, batches=BATCHES)
    assert all(param.grad is None for param in model.parameters())
    usual = network(DEVICE)
    optimizer = AdamW_AGC(param_groups(usual, weight_decay=0.05), lr=1e-3, clipping=0.02)
    for inputs, labels in BATCHES:
        loss: Any = nn.functional.cross_entropy(usual(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(names["optimizers"]) == len(list(model.parameters()))
    for ours, theirs in zip(model.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
