"""What suggest_clipping refuses, and what it says then."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from agc_triton import SGD_AGC, suggest_clipping
from tests.choosing.given import given_batches, given_loss, given_model
from tests.support.places import DEVICE


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 2, float("nan")])
def test_a_target_is_a_share(target: float) -> None:
    model = given_model()
    with pytest.raises(ValueError, match=rf"between 0 and 1, not {target}"):
        suggest_clipping(model, given_loss, given_batches(model), target=target)


def test_there_has_to_be_a_batch() -> None:
    with pytest.raises(ValueError, match="no batch"):
        suggest_clipping(given_model(), given_loss, iter([]))


def test_some_parameter_has_to_have_a_gradient() -> None:
    model, other = given_model(), nn.Linear(2, 2).to(DEVICE)
    optimizer = SGD_AGC(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter has had a gradient in 3 batches"):
        suggest_clipping(model, given_loss, given_batches(model), optimizer)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda model, batch: 1.0, TypeError, "must return the loss as a tensor, not float"),
        (lambda model, batch: model["p0"], ValueError, r"not shape \(6, 5\), in batch 0"),
        (lambda model, batch: model["p0"].detach().sum(), ValueError, "depends on no parameter"),
    ],
    ids=["float", "matrix", "detached"],
)
def test_a_loss_is_one_number_of_the_model(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        suggest_clipping(given_model(), loss, [None])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_named(value: float) -> None:
    model = given_model()
    batches = given_batches(model)
    grad = batches[1][2]
    assert grad is not None
    grad[0] = value
    with pytest.raises(RuntimeError, match=r"gradient of 'p2' is not finite in batch 1"):
        suggest_clipping(model, given_loss, batches)


def test_hooks_that_may_update_are_refused() -> None:
    model = given_model()
    model["p1"].register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match="'p1' has hooks"):
        suggest_clipping(model, given_loss, given_batches(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": [torch.zeros(2)]}, "takes the model itself, not list"),
        ({"optimizer": [torch.zeros(2)]}, "optimizer with param_groups, not list"),
    ],
)
def test_a_model_and_an_optimizer_are_what_they_are(
    arguments: dict[str, Any], message: str
) -> None:
    model = given_model()
    given = {"model": model, "loss_fn": given_loss, "batches": given_batches(model), **arguments}
    with pytest.raises(TypeError, match=message):
        suggest_clipping(**given)


def test_an_uninitialized_parameter_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3)).to(DEVICE)
    with pytest.raises(ValueError, match=r"'0.weight' is uninitialized; run the model once"):
        suggest_clipping(model, given_loss, [])


def test_options_of_groups_are_checked() -> None:
    model = given_model()
    optimizer = SGD_AGC(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["agc_eps"] = -1.0
    with pytest.raises(ValueError, match=r"Invalid agc_eps value: -1.0 in parameter group 0"):
        suggest_clipping(model, given_loss, given_batches(model), optimizer)


@pytest.mark.parametrize("package", ["pandas", "matplotlib"])
def test_a_missing_package_is_named_before_a_batch_is_run(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    batches = iter([None])
    with pytest.raises(ImportError, match=f"pip install {package}"):
        suggest_clipping(given_model(), given_loss, batches, plot=tmp_path / "ratios.png")
    assert list(batches) == [None]
