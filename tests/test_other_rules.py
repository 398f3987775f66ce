"""Rules that are none of the package's: the example's Lion, and the toy that docs describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim import SGD

from agc_triton.optim import OPTIMIZERS
from agc_triton.optim.functional import no_fused
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.rule import KernelRule, Rule, TensorLists
from examples.lion import Lion, Lion_AGC
from tests.support import formulas
from tests.support.checks import (
    clipped,
    nothing_changes,
    oracle_for,
    states_of,
    step_and_check,
    values_of,
)
from tests.support.optimizers import CLIPPING, build
from tests.support.places import Place
from tests.support.rounded import Rounded
from tests.support.tensors import grads_like, same, set_grads

OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}


def test_lion_follows_its_own_base(place: Place) -> None:
    params, others = place.weights(), place.weights()
    ours: Any = Lion_AGC(params, clipping=CLIPPING, backend=place.backend, **OPTIONS)
    theirs = Lion(others, **OPTIONS)
    for step in range(3):
        grads = grads_like(params, step)
        for p, other, grad in zip(params, others, grads, strict=True):
            p.grad, other.grad = grad, clipped(other, grad, CLIPPING)
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, others)
    torch.testing.assert_close(states_of(ours, params), states_of(theirs, others))


def test_lion_goes_on_from_a_checkpoint_of_its_base(place: Place) -> None:
    params = place.weights()
    theirs = Lion(params, **OPTIONS)
    set_grads(params, 0)
    theirs.step()
    ours: Any = Lion_AGC(params, clipping=0, backend=place.backend)
    ours.load_state_dict(theirs.state_dict())
    assert same(states_of(ours, params), states_of(theirs, params))
    del theirs.state[params[0]]["exp_avg"]
    theirs.state[params[0]]["exp_avg"] = torch.zeros(1, device=params[0].device)
    with nothing_changes(params, ours), pytest.raises(ValueError, match="exp_avg in the check"):
        ours.load_state_dict(theirs.state_dict())


def toy_update(lists: TensorLists, group: Mapping[str, Any], **_scaler: Tensor | None) -> None:
    """A step along the sum of all gradients."""
    torch._foreach_add_(lists.states[0], lists.grads)
    torch._foreach_add_(lists.params, lists.states[0], alpha=-group["lr"])


@triton.jit
def toy_prepare(raw, scalars):  # type: ignore[no-untyped-def]  # on the device
    return (raw[0],), ()


@triton.jit  # type: ignore[untyped-decorator]  # Triton's
def toy(p, g, states, h, FLAGS: tl.constexpr):  # type: ignore[no-untyped-def]  # on the device
    total = states[0] + g
    return p - h[0] * total, (total,)


class Toy(SGD):
    """A third party's class: it has options of SGD's, and a state that SGD has not."""

    def __init__(self, params: Any, lr: float = 0.5, maximize: bool = False) -> None:
        super().__init__(params, lr, maximize=maximize)


class Toy_AGC(AGCOptimizer, Toy):
    """Sums gradients."""

    rule = Rule(
        toy_update,
        no_fused,
        KernelRule(
            f"{__name__}:toy", lambda _: 0, lambda _: ("total",), lambda group: (group["lr"],), 1
        ),
        ("total",),
    )

    def _init_states(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                self.state[p]["total"] = torch.zeros_like(p)


def toy_formula(
    p: Rounded, g: Rounded, state: formulas.State, o: formulas.Options
) -> tuple[Rounded, formulas.State]:
    total = state["total"] + g if state else g
    return p - total * o["lr"], {"total": total}


def steps(optimizer: Any, oracle: Any, params: Sequence[Tensor]) -> None:
    for step in range(3):
        step_and_check(optimizer, oracle, params, grads_like(params, step))


def test_a_rule_is_added_as_the_docs_describe(
    monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    """docs/architecture.md, "Adding an optimizer": all that it names, and nothing else."""
    monkeypatch.setitem(OPTIMIZERS, "Toy", Toy_AGC)
    monkeypatch.setitem(formulas.RULES, "Toy", toy_formula)
    params = place.weights()
    options: dict[str, Any] = {"lr": 0.5, "clipping": CLIPPING, "backend": place.backend}
    optimizer: Any = build("Toy", params, options)
    oracle = oracle_for("Toy", params, place, **options)
    steps(optimizer, oracle, params)
    assert optimizer.explain()["backend"].iloc[0] == place.backend
    assert all(set(state) == {"total"} for state in values_of(optimizer, params)[1])
