"""What torch's optimizers cannot step is refused before a gradient is clipped or a weight moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, Optimizer, SparseAdam

from agc_triton import AGC
from tests.optim.test_errors import assert_says
from tests.optim.test_wrapper import torch_optimizers
from tests.support.checks import nothing_changes
from tests.support.optimizers import needs_muon
from tests.support.places import DEVICE
from tests.support.tensors import assign, grad_like, set_grads, weights

MATRICES = ((4, 3), (4, 3))


def sparse_like(param: Tensor) -> Tensor:
    return grad_like(param).to_sparse(1)


def steps(optimizer: Optimizer, params: list[Tensor], grads: list[Any]) -> None:
    """One step, with a closure where there must be one."""

    def evaluate() -> float:
        assign(params, grads)
        return 1.0

    assign(params, grads)
    optimizer.step(evaluate if "LBFGS" in repr(optimizer) else None)


def raised(call: Callable[[], Any]) -> type[Exception] | None:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return type(error)
    return None


@pytest.mark.parametrize("cls", torch_optimizers())
@pytest.mark.parametrize("kind", ["sparse", "dense"])
# torch's Adagrad makes a sparse tensor without saying whether it is to be checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_gradients_that_torch_refuses_are_refused_before_any_is_clipped(
    cls: Any, kind: str
) -> None:
    ours, theirs = (weights(MATRICES, device=DEVICE) for _ in range(2))
    grads = [grad_like(ours[0]) if cls is not SparseAdam else sparse_like(ours[0])]
    grads += [sparse_like(ours[1]) if kind == "sparse" else grad_like(ours[1])]
    refused = raised(lambda: steps(cls(theirs, lr=0.1), theirs, grads))
    wrapped = AGC(cls(ours, lr=0.1))
    if refused is None:
        steps(wrapped, ours, grads)
        return
    assign(ours, grads)
    with nothing_changes(ours, wrapped), pytest.raises(refused) as caught:
        wrapped.step()
    assert_says(caught.value, cls.__name__, f"{kind} gradients", "parameter 1 of group 0")
    assert_says(caught.value, "SparseAdam, SGD or Adagrad" if kind == "sparse" else "Adam_AGC")


@pytest.mark.parametrize("cls", torch_optimizers())
def test_complex_parameters_that_torch_refuses_are_refused_at_once(cls: Any) -> None:
    params = weights(MATRICES, torch.complex64, DEVICE)

    def trained() -> None:
        steps(cls(params, lr=0.1), params, [grad_like(p) for p in params])

    if raised(trained) is None:
        steps(AGC(cls(params, lr=0.1)), params, [grad_like(p) for p in params])
    elif cls is not SparseAdam:  # whose own constructor does so
        with pytest.raises(ValueError, match="complex") as caught:
            AGC(cls(params, lr=0.1))
        assert_says(caught.value, cls.__name__, "parameter 0 of group 0", "AdamW_AGC")


def test_what_others_take_is_their_own_matter() -> None:
    class Densified(Adam):
        """As its base, but for sparse gradients."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = p.grad.to_dense()
            return super().step(closure)

    params = weights(MATRICES, device=DEVICE)
    wrapped = AGC(Densified(params))
    steps(wrapped, params, [sparse_like(p) for p in params])
    assert set(wrapped.state) == set(params)


# Base, what is added to its groups, and what the error says.
ADDED = [
    pytest.param(
        "Muon", weights([(3,)])[0], ["Muon steps matrices only", "(3,)"], marks=needs_muon
    ),
    pytest.param(
        "Muon", weights([(2, 2)], torch.complex64)[0], ["Muon", "complex"], marks=needs_muon
    ),
    ("Adafactor", weights([(2, 2)], torch.complex64)[0], ["Adafactor", "complex"]),
    ("SparseAdam", weights([(2, 2)], torch.complex64)[0], ["SparseAdam", "complex"]),
    ("LBFGS", weights([(2, 2)])[0], ["LBFGS", "first group only", "one group"]),
]


@pytest.mark.parametrize(("cls", "added", "says"), ADDED)
def test_groups_that_torch_finds_out_about_too_late_are_not_added(
    cls: str, added: Tensor, says: list[str]
) -> None:
    params = weights(MATRICES, device=DEVICE)
    wrapped = AGC(getattr(torch.optim, cls)(params, lr=0.1))
    with nothing_changes(params, wrapped), pytest.raises(ValueError, match="group 1") as caught:
        wrapped.add_param_group({"params": [added.to(DEVICE)]})
    assert_says(caught.value, *says)
    assert len(wrapped.param_groups) == 1


def test_lbfgs_without_a_closure() -> None:
    params = weights(device=DEVICE)
    wrapped = AGC(LBFGS(params))
    set_grads(params, 0)
    with nothing_changes(params, wrapped), pytest.raises(TypeError, match="closure") as caught:
        wrapped.step()
    assert_says(caught.value, "LBFGS", "step(closure)", "backward()")


def test_lbfgs_and_gradscaler() -> None:
    params = weights(device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE)
    set_grads(params, 0)
    scaler.scale(torch.zeros((), device=DEVICE))
    before = [p.clone() for p in params]
    with pytest.raises(TypeError, match="GradScaler has none to give"):
        scaler.step(AGC(LBFGS(params)))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("bad", [0, 2])
def test_an_evaluation_that_is_not_finite_says_whether_weights_have_moved(bad: int) -> None:
    params = weights(device=DEVICE)
    wrapped = AGC(LBFGS(params, lr=0.1), nonfinite="raise")
    evaluations = 0

    def evaluate() -> float:
        nonlocal evaluations
        set_grads(params, evaluations)
        if evaluations == bad:
            params[1].grad = torch.full_like(params[1], torch.nan)
        evaluations += 1
        return -float(evaluations)  # it goes on while the loss falls

    before = [p.clone() for p in params]
    with pytest.raises(RuntimeError, match="parameter 1 of group 0") as caught:
        wrapped.step(evaluate)
    unmoved = all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert unmoved == (bad == 0) == ("nothing has been updated" in str(caught.value))
    assert unmoved != ("checkpoint" in str(caught.value))
    assert "skip_unit" not in str(caught.value)  # which AGC does not take
