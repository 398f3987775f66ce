"""AGC around torch's optimizers and around one as third parties write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Adagrad, Optimizer, SparseAdam
from torch.optim.lr_scheduler import StepLR

from agc_triton import AGC, adaptive_clip_grad_
from tests.support.bases import Lookahead
from tests.support.tensors import grad_like, parameters, same, set_grads
from tests.support.training import train

CLIPPING = 0.02
Closure = Callable[[], float]


def torch_optimizers() -> list[Any]:
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type)]
    return [c for c in classes if issubclass(c, Optimizer) and c is not Optimizer]


# All with and without a closure; LBFGS cannot do without, and reevaluates in its line search.
CASES = [
    *((c, {}, False) for c in torch_optimizers() if c not in (LBFGS, SparseAdam)),
    *((c, {}, True) for c in torch_optimizers() if c is not SparseAdam),
    (LBFGS, {"line_search_fn": "strong_wolfe"}, True),
]


class SharpnessAware(Optimizer):
    """As third parties write them: two evaluations per step, an entry of its own in checkpoints."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.updates = 0

    def zero_grad(self) -> None:  # type: ignore[override]  # apex's FusedAdam takes no argument
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "updates"})

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]  # it needs one
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        moves = [(p, 0.05 * p.grad) for g in self.param_groups for p in g["params"]]
        for p, move in moves:
            p.add_(move)
        evaluate()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
        for p, move in moves:
            p.sub_(move)
        self.updates += 1
        return loss

    def evaluate(self) -> str:
        return "a method that torch's optimizers do not have"


def backward(params: list[Parameter], seed: int = 0) -> Tensor:
    """A loss whose gradient depends on the parameters; rows are under and over their limits."""
    for p in params:
        p.grad = None
    loss = sum(((p - 3) ** 2 * grad_like(p, seed)).sum() for p in params)
    assert isinstance(loss, Tensor)
    torch.autograd.backward(loss)
    return loss


def params_for(cls: Any) -> list[Parameter]:
    # Muon takes matrices only.
    return parameters([(6, 5), (4, 3)]) if cls.__name__ == "Muon" else parameters()


def sgd(**options: Any) -> tuple[list[Parameter], SGD]:
    params = parameters()
    return params, SGD(params, lr=0.1, momentum=0.9, **options)


@pytest.mark.parametrize(("cls", "options", "with_closure"), CASES)
def test_steps_as_the_base_does_on_clipped_gradients(
    cls: Any, options: dict[str, Any], with_closure: bool
) -> None:
    ours, theirs = params_for(cls), params_for(cls)
    wrapped, base = AGC(cls(ours, **options), clipping=CLIPPING), cls(theirs, **options)
    calls = {"ours": 0, "theirs": 0}

    def evaluate() -> Tensor:
        calls["ours"] += 1
        return backward(ours)

    def evaluate_and_clip() -> Tensor:
        calls["theirs"] += 1
        loss = backward(theirs)
        adaptive_clip_grad_(theirs, clipping=CLIPPING)
        return loss

    for _ in range(3):
        if with_closure:
            assert same(wrapped.step(evaluate), base.step(evaluate_and_clip))
        else:
            evaluate()
            evaluate_and_clip()
            assert wrapped.step() is base.step() is None
    assert calls["ours"] == calls["theirs"]
    assert calls["ours"] > 3 or cls is not LBFGS
    assert same(ours, theirs)
    assert same(wrapped.state_dict()["state"], base.state_dict()["state"])
    assert not same(ours, params_for(cls))


@pytest.mark.parametrize("coalesced", [False, True])
# torch's Adagrad makes a sparse tensor without saying whether it is to be checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("cls", [SGD, Adagrad, SparseAdam])
def test_row_sparse_gradients_are_clipped_where_the_base_takes_them(
    cls: Any, coalesced: bool
) -> None:
    (ours,), (theirs,) = parameters([(7, 4)]), parameters([(7, 4)])
    wrapped, base = AGC(cls([ours], lr=0.1), clipping=CLIPPING), cls([theirs], lr=0.1)
    for seed in range(3):
        values = grad_like(torch.empty(5, 4), seed)
        for param in (ours, theirs):
            grad = torch.sparse_coo_tensor(
                torch.tensor([[5, 1, 5, 2, 1]]), values.clone(), (7, 4), check_invariants=True
            )
            param.grad = grad.coalesce() if coalesced else grad
        adaptive_clip_grad_(theirs, clipping=CLIPPING)
        wrapped.step()
        base.step()
    assert same(ours, theirs)
    before = parameters([(7, 4)])[0]
    moved = (ours != before).any(dim=1)
    assert moved.tolist() == [False, True, True, False, False, True, False]


def test_third_party_optimizers_keep_their_own_ways() -> None:
    ours, theirs = parameters(), parameters()
    wrapped, base = AGC(SharpnessAware(ours), clipping=CLIPPING), SharpnessAware(theirs)

    def evaluate_and_clip() -> Tensor:
        loss = backward(theirs)
        adaptive_clip_grad_(theirs, clipping=CLIPPING)
        return loss

    for _ in range(3):
        ours_loss = wrapped.step(lambda: backward(ours))
        assert same(ours_loss, base.step(evaluate_and_clip))  # type: ignore[arg-type]  # likewise
    assert same(ours, theirs)
    assert wrapped.evaluate() == base.evaluate()
    assert wrapped.updates == 3
    saved = wrapped.state_dict()
    assert saved["updates"] == 3
    again = AGC(SharpnessAware(parameters()), clipping=0.5)
    again.load_state_dict(saved)
    assert again.updates == 3
    assert again.param_groups[0]["clipping"] == CLIPPING


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_base_that_wraps_another_and_calls_no_hooks_is_clipped(with_closure: bool) -> None:
    (ours, inner), (theirs, expected) = sgd(), sgd()
    wrapped, base = AGC(Lookahead(inner), clipping=CLIPPING), Lookahead(expected)
    for seed in range(3):
        backward(ours, seed)
        wrapped.step((lambda seed=seed: backward(ours, seed)) if with_closure else None)
        backward(theirs, seed)
        adaptive_clip_grad_(theirs, clipping=CLIPPING)
        base.step()
    assert same(ours, theirs)
    assert same(inner.state_dict()["state"], expected.state_dict()["state"])


def test_zero_grad_works_where_the_base_takes_no_argument() -> None:
    params = parameters()
    set_grads(params, 0)
    AGC(SharpnessAware(params)).zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_the_bases(set_to_none: bool) -> None:
    params, base = sgd()
    set_grads(params, 0)
    AGC(base).zero_grad(set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in params)
    else:
        assert all(p.grad is not None and not p.grad.any() for p in params)


@pytest.mark.parametrize("on_base", [False, True])
def test_schedulers_take_the_wrapper_and_the_base(on_base: bool) -> None:
    params, base = sgd()
    wrapped = AGC(base)
    scheduler = StepLR(base if on_base else wrapped, step_size=2, gamma=0.1)
    rates = []
    for seed in range(4):
        set_grads(params, seed)
        wrapped.step()
        scheduler.step()
        rates.append(wrapped.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert copy.deepcopy(wrapped).param_groups[0]["lr"] == rates[-1]


def test_it_is_an_optimizer_that_shares_what_the_base_has() -> None:
    params, base = sgd()
    wrapped = AGC(base)
    assert isinstance(wrapped, Optimizer)
    train(wrapped, params, range(2))
    for _ in range(2):
        assert wrapped.param_groups is base.param_groups
        assert wrapped.state is base.state
        assert wrapped.defaults is base.defaults
        wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    base.param_groups[0]["lr"] = 7.0
    assert wrapped.param_groups[0]["lr"] == 7.0
    assert same(wrapped.state_dict(), base.state_dict())
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapped.no_such_thing


def test_state_and_groups_can_be_replaced_as_on_any_optimizer() -> None:
    params, base = sgd()
    wrapped: Any = AGC(base)
    train(wrapped, params, range(1))
    wrapped.state = type(base.state)(dict)
    wrapped.param_groups = [{**group, "lr": 0.5} for group in base.param_groups]
    wrapped.defaults = {**base.defaults, "lr": 0.25}
    assert not base.state
    assert base.defaults["lr"] == 0.25
    assert base.param_groups[0]["lr"] == 0.5


def test_asking_for_anything_before_there_is_a_base_is_an_attribute_error() -> None:
    # As pickle and copy make it; a look-up on a base that is not there would not end.
    with pytest.raises(AttributeError, match="optimizer"):
        _ = AGC.__new__(AGC).anything
