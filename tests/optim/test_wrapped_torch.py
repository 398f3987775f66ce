"""Adafactor, Muon, LBFGS and SparseAdam through AGC: numbers, schedulers and checkpoints.

What they do with a gradient is not known to the oracle: it says whether they have been given the
right one, at every evaluation, and a base of its own, given the same, whether they were let be.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from agc_triton import AGC, adaptive_clip_grad_
from tests.support.checks import check_clipped
from tests.support.disk import on_disk
from tests.support.optimizers import CLIPPING, needs_muon
from tests.support.places import Place
from tests.support.soak import soaked
from tests.support.tensors import FEW_SHAPES, Shape, assign, grad_like, same


class Base(NamedTuple):
    """One of torch's optimizers, its options, and shapes of what it takes."""

    cls: str
    options: dict[str, Any]
    shapes: Sequence[Shape] = FEW_SHAPES

    def over(self, params: Sequence[Tensor]) -> Optimizer:
        made: Optimizer = getattr(torch.optim, self.cls)(params, **self.options)
        return made


MATRICES = ((3, 20), (2, 12))
BASES = {
    "Adafactor": Base("Adafactor", {"lr": 0.1, "weight_decay": 0.1}),
    "Muon": Base("Muon", {"lr": 0.1}, MATRICES),
    "Muon as AdamW": Base("Muon", {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw"}, MATRICES),
    "LBFGS": Base("LBFGS", {"lr": 0.1, "max_iter": 4}),
    "LBFGS, line search": Base("LBFGS", {"max_iter": 4, "line_search_fn": "strong_wolfe"}),
    "SparseAdam": Base("SparseAdam", {"lr": 0.1}, ((7, 4), (5, 3))),
}
each_base = pytest.mark.parametrize(
    "base",
    [pytest.param(b, id=i, marks=needs_muon if b.cls == "Muon" else ()) for i, b in BASES.items()],
)


class Seen(NamedTuple):
    """An evaluation: weights, gradients as they were and as the optimizer found them, loss."""

    weights: list[Tensor]
    grads: list[Tensor]
    given: list[Tensor]
    loss: Tensor


class Closure:
    """A loss of the weights and its gradients, row-sparse and unsorted if asked for."""

    def __init__(self, params: Sequence[Tensor], sparse: bool) -> None:
        self.params, self.sparse, self.seed = params, sparse, 0
        self.grads: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.seen: list[Seen] = []
        self.loss = torch.zeros((), device=params[0].device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self.note()
        self.weights = [p.clone() for p in self.params]
        scales = [grad_like(p, self.seed) for p in self.params]
        pairs = list(zip(self.params, scales, strict=True))
        assign(self.params, [self.gradient(p, scale) for p, scale in pairs])
        self.grads = [p.grad.clone() for p in self.params if p.grad is not None]
        self.loss = torch.stack([((p - 3) ** 2 * s.abs()).sum() / 2 for p, s in pairs]).sum()
        return self.loss

    def gradient(self, param: Tensor, scale: Tensor) -> Tensor:
        grad = (param - 3) * scale.abs()
        if not self.sparse:
            return grad
        rows = torch.tensor([3, 1, 3, 0], device=param.device)
        return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=True)

    def note(self) -> None:
        """What the last evaluation's gradients have become."""
        if self.grads:
            given = [p.grad.clone() for p in self.params if p.grad is not None]
            self.seen.append(Seen(self.weights, self.grads, given, self.loss))
            self.grads = []


def replay(evaluations: list[Seen], params: Sequence[Tensor]) -> Any:
    """The same evaluations again, asked for at the same weights."""

    def evaluate() -> Tensor:
        seen = evaluations.pop(0)
        assert same([p.detach() for p in params], seen.weights)
        assign(params, seen.given)
        return seen.loss

    return evaluate


def check_step(wrapped: AGC, closure: Closure, other: Optimizer, place: Place) -> int:
    """A step, and the same of a base that is given what the wrapped one was; its evaluations."""
    closure.seed += 1
    loss = wrapped.step(closure)
    closure.note()
    evaluations, closure.seen = closure.seen, []
    for seen in evaluations:
        for weight, grad, given in zip(seen.weights, seen.grads, seen.given, strict=True):
            check_clipped(weight, grad.to_dense(), given.to_dense(), place)
        assert not same(seen.grads, seen.given)
    found = len(evaluations)
    params = [p for group in other.param_groups for p in group["params"]]
    assert same(other.step(replay(evaluations, params)), loss)
    assert not evaluations
    return found


@each_base
@pytest.mark.parametrize(
    ("scheduled", "dtype"),
    soaked(
        itertools.product((False, True), (torch.float32, torch.float64)),
        lambda scheduled, dtype: scheduled is (dtype is torch.float64),
    ),
    ids=str,
)
def test_it_steps_as_the_base_on_what_the_oracle_clips(
    base: Base, scheduled: bool, dtype: torch.dtype, place: Place
) -> None:
    sparse = base.cls == "SparseAdam"
    ours = place.weights(base.shapes, dtype)
    theirs = [p.clone() for p in ours]
    wrapped = AGC(base.over(ours), clipping=CLIPPING, backend=place.backend)
    if sparse:  # these are clipped in torch, whatever the backend
        place = Place("torch", place.device)
    other, closure = base.over(theirs), Closure(ours, sparse)
    targets = (wrapped, other) if scheduled else ()
    schedulers = [CosineAnnealingLR(optimizer, T_max=4) for optimizer in targets]
    evaluations = 0
    for _ in range(3):
        evaluations += check_step(wrapped, closure, other, place)
        for scheduler in schedulers:
            scheduler.step()
    assert evaluations > 3 if base.cls == "LBFGS" else evaluations == 3
    assert same(ours, theirs)
    assert same(wrapped.state_dict()["state"], other.state_dict()["state"])
    assert not same(ours, place.weights(base.shapes, dtype))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (wrapped, other)]
    assert rates[0] == rates[1]
    assert (rates[0] != base.over(place.weights(base.shapes)).defaults["lr"]) == scheduled


def clipping_closure(params: Sequence[Tensor], closure: Closure) -> Callable[[], Tensor]:
    """What a plain base needs to go on as a wrapped one."""

    def evaluate() -> Tensor:
        loss = closure()
        adaptive_clip_grad_(params, clipping=CLIPPING)
        return loss

    return evaluate


@each_base
@pytest.mark.parametrize(("saved", "loaded"), [(True, True), (True, False), (False, True)])
def test_checkpoints_go_from_and_to_the_plain_base(
    base: Base, saved: bool, loaded: bool, torch_place: Place
) -> None:
    sparse = base.cls == "SparseAdam"

    def stepper(params: Sequence[Tensor], wrapped: bool) -> tuple[Any, Callable[[int], Any]]:
        plain, closure = base.over(params), Closure(params, sparse)
        optimizer = AGC(plain, clipping=CLIPPING) if wrapped else plain
        evaluate: Any = closure if wrapped else clipping_closure(params, closure)

        def step(seed: int) -> Any:
            closure.seed = seed
            return optimizer.step(evaluate)

        return optimizer, step

    params = torch_place.weights(base.shapes)
    first, step = stepper(params, saved)
    for seed in range(2):
        step(seed)
    copies = copy.deepcopy(params)
    second, again = stepper(copies, loaded)
    second.load_state_dict(on_disk(first.state_dict()))
    for seed in range(2, 4):
        assert same(step(seed), again(seed))
    assert same(params, copies)
    assert same(first.state_dict()["state"], second.state_dict()["state"])
