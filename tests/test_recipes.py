"""The recipes of docs/integrations.md that need no other package run and train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from agc_triton import AdamW_AGC, param_groups
from tests.support.bases import SAM, Lookahead
from tests.support.optimizers import needs_muon
from tests.support.places import DEVICE
from tests.support.recipes import batches_of, loss_of, network, run_recipe
from tests.support.tensors import same

BATCHES = batches_of(8, DEVICE)


TRAINING = ["SAM", "Lookahead", "Averages of weights: EMA and SWA", "LBFGS"]


@pytest.mark.parametrize(
    "heading", [*TRAINING, pytest.param("Muon and Adafactor", marks=needs_muon)]
)
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


def test_the_clips_log_in_a_loop() -> None:
    logged: list[dict[str, float]] = []
    names = run_recipe(
        "The clip's log in a loop", model=network(DEVICE), batches=BATCHES, log=logged.append
    )
    assert len(logged) == len(BATCHES) // 4
    assert all(0 <= numbers["agc/clipped"] <= 1 for numbers in logged)
    names["monitor"].close()


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


@needs_muon
def test_muon_has_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = network(DEVICE)
    names = run_recipe("Muon and Adafactor", model=model, batches=BATCHES)
    assert names["muon"].state.keys() == {model[0].weight}
    assert names["adamw"].state.keys() == set(model.parameters()) - {model[0].weight}
    assert {group["clipping"] for group in names["muon"].param_groups} == {0.02}


def test_lbfgs_with_its_head_unclipped() -> None:
    model = network(DEVICE)
    names = run_recipe("LBFGS", model=model, batches=BATCHES)
    assert {*map(id, names["clipped"])} == {
        id(p) for p in (*model[0].parameters(), *model[1].parameters())
    }
    assert names["plain"].state[model[0].weight]["func_evals"] > len(BATCHES)


def test_sparse_rows_train_with_the_rest() -> None:
    model, embedding = network(DEVICE), nn.Embedding(5, 4, sparse=True, device=DEVICE)
    batches = [(labels, labels) for _, labels in BATCHES]
    before = embedding.weight.detach().clone()
    loss = loss_of(nn.Sequential(embedding, model), batches)
    run_recipe("Sparse embeddings", model=model, embedding=embedding, batches=batches)
    assert loss_of(nn.Sequential(embedding, model), batches) < loss
    assert (before != embedding.weight).any(dim=1).tolist() == [True] * 3 + [False] * 2
