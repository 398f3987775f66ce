"""Bases that do not update as torch's do: clipped wherever they use a gradient, or refused."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from agc_triton import AGC, SGD_AGC, adaptive_clip_grad_
from tests.optim.test_errors import assert_says
from tests.support.bases import SAM
from tests.support.checks import nothing_changes
from tests.support.tensors import grad_like, parameters, same, set_grads

CLIPPING = 0.02


class ClosureLater(Optimizer):
    """Uses the gradients that are there, then evaluates and uses those."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]  # it needs one
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            p.sub_(0.5 * p.grad)
        loss = torch.enable_grad()(closure)()
        for p in params:
            p.sub_(0.5 * p.grad)
        return loss


def backward(params: list[Any]) -> Tensor:
    for p in params:
        p.grad = None
    loss = torch.stack([((p - 3) ** 2 * grad_like(p)).sum() for p in params]).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's
    return loss


def test_sharpness_aware_bases_are_refused_and_clip_from_within() -> None:
    params = parameters()
    with nothing_changes(params), pytest.raises(TypeError, match="SAM updates in") as caught:
        AGC(SAM(params, SGD, lr=0.1))
    assert_says(caught.value, "first_step and second_step", "SAM(params, agc_triton.SGD_AGC, ...)")


def test_the_way_round_clips() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = SAM(ours, SGD_AGC, lr=0.1, clipping=CLIPPING)
    expected = SAM(theirs, SGD, lr=0.1)
    for _ in range(3):
        backward(ours)
        optimizer.step(lambda: backward(ours))
        backward(theirs)
        expected.first_step()
        backward(theirs)
        for p, move in expected.moved:  # limits are of the weights that are stepped on
            p.data.sub_(move)
        adaptive_clip_grad_(theirs, clipping=CLIPPING)
        expected.moved = []
        expected.second_step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    assert not same(ours, parameters())


def test_what_is_there_before_the_closure_is_clipped_too() -> None:
    ours, theirs = parameters(), parameters()
    wrapped, base = AGC(ClosureLater(ours), clipping=CLIPPING), ClosureLater(theirs)

    def evaluate_and_clip() -> Tensor:
        loss = backward(theirs)
        adaptive_clip_grad_(theirs, clipping=CLIPPING)
        return loss

    for _ in range(3):
        backward(ours)
        evaluate_and_clip()
        assert same(wrapped.step(lambda: backward(ours)), base.step(evaluate_and_clip))
    assert same(ours, theirs)


def test_stale_gradients_need_not_be_finite() -> None:
    params = parameters()
    wrapped = AGC(ClosureLater(params), clipping=CLIPPING, nonfinite="raise")
    backward(params)
    wrapped.step(lambda: backward(params))

    def diverged() -> None:
        for p in params:
            p.grad = torch.full_like(p, torch.nan)

    with pytest.raises(RuntimeError, match="holds NaN"):
        wrapped.step(diverged)
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    # torch's own evaluate first, and look at nothing that is there before.
    torchs = parameters()
    optimizer = AGC(SGD(torchs, lr=0.1), nonfinite="raise")
    for p in torchs:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(lambda: backward(torchs))
    assert all(bool(p.isfinite().all()) for p in torchs)


def test_a_step_that_calls_no_hooks_is_told_of() -> None:
    params = parameters()
    base = SGD(params, lr=0.1)
    wrapped = AGC(base, clipping=CLIPPING)
    base.step = MethodType(lambda self: None, base)  # type: ignore[method-assign]  # as some patch it
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="SGD has stepped without") as caught:
        wrapped.step()
    assert_says(caught.value, "adaptive_clip_grad_")
