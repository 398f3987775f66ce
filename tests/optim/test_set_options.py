"""Options of a whole optimizer: checked whenever they are set, refused in groups; names only."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD

from agc_triton import AGC, SGD_AGC, AdamW_AGC, adaptive_clip_grad_
from tests.optim.test_errors import assert_says, wrapped_sgd
from tests.support.checks import nothing_changes
from tests.support.optimizers import OURS
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

TARGETS = [AdamW_AGC, wrapped_sgd]
all_targets = pytest.mark.parametrize("target", TARGETS)

BAD: list[tuple[str, Any, tuple[str, ...]]] = [
    ("backend", "trition", ("'trition'", "auto, triton, torch")),
    ("backend", None, ("None", "auto, triton, torch")),
    ("nonfinite", "skip", ("'skip'", "propagate, skip_unit, raise")),
    ("nonfinite", True, ("True", "propagate, skip_unit, raise")),
]


@pytest.mark.parametrize(("key", "value", "parts"), BAD)
@all_targets
def test_bad_values_are_refused_whenever_they_are_set(
    target: Any, key: str, value: Any, parts: tuple[str, ...]
) -> None:
    params = parameters()
    optimizer = target(params)
    train(optimizer, params, range(1))
    before = getattr(optimizer, key)
    for act in (lambda: setattr(optimizer, key, value), lambda: target(params, **{key: value})):
        with nothing_changes(params, optimizer), pytest.raises(ValueError, match=key) as caught:
            act()
        assert_says(caught.value, *parts)
    assert getattr(optimizer, key) == before


@all_targets
def test_values_are_kept_where_objects_are_copied(target: Any) -> None:
    optimizer = target(parameters(), backend="torch")
    optimizer.nonfinite = "raise"
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.backend, twin.nonfinite) == ("torch", "raise")


@all_targets
def test_what_was_pickled_without_them_has_the_defaults(target: Any) -> None:
    optimizer = target(parameters(), nonfinite="raise")
    old = {k: v for k, v in optimizer.__getstate__().items() if k not in ("backend", "nonfinite")}
    again = optimizer.__class__.__new__(optimizer.__class__)
    again.__setstate__(old)
    assert (again.backend, again.nonfinite) == ("auto", "propagate")


def test_triton_is_not_set_beside_a_group_that_asks_for_torch() -> None:
    optimizer = SGD_AGC(parameters(), foreach=True)
    with pytest.raises(ValueError, match="foreach=True in parameter group 0"):
        optimizer.backend = "triton"
    assert optimizer.backend == "auto"


WAYS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "constructor": lambda make, option: make([{"params": parameters(), **option}]),
    "add_param_group": lambda make, option: make(parameters()).add_param_group(
        {"params": parameters(), **option}
    ),
}


@pytest.mark.parametrize("key", ["backend", "nonfinite"])
@pytest.mark.parametrize("way", WAYS)
@all_targets
def test_groups_cannot_set_them(target: Any, way: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' cannot be set in parameter group") as caught:
        WAYS[way](target, {key: "torch"})
    assert_says(caught.value, f"optimizer.{key}")


@pytest.mark.parametrize("key", ["backend", "nonfinite"])
@all_targets
def test_loaded_groups_cannot_set_them(target: Any, key: str) -> None:
    params = parameters()
    optimizer = target(params)
    train(optimizer, params, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = "torch"
    with nothing_changes(params, optimizer), pytest.raises(ValueError, match=f"'{key}' cannot"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("key", ["backend", "nonfinite"])
@all_targets
def test_a_group_that_sets_them_between_steps_is_refused(target: Any, key: str) -> None:
    params = parameters()
    optimizer = target([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, range(1))
    optimizer.param_groups[1][key] = "torch"
    with nothing_changes(params, optimizer), pytest.raises(ValueError, match=f"'{key}' .* group 1"):
        optimizer.step()
    del optimizer.param_groups[1][key]
    train(optimizer, params, range(1, 2))


@all_targets
def test_a_group_may_say_what_the_optimizer_says(target: Any) -> None:
    # As torch's ZeroRedundancyOptimizer writes all arguments into groups, before each step too.
    params = parameters()
    optimizer = target([{"params": params, "backend": "torch"}], backend="torch")
    optimizer.param_groups[0]["nonfinite"] = "propagate"
    train(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.backend = "auto"
    with pytest.raises(ValueError, match="'backend' cannot be set in parameter group 0"):
        optimizer.step()


class WithBackend(SGD):
    """As a base that has an option of that name itself."""

    def __init__(self, params: Any) -> None:
        super().__init__([{"params": list(params), "backend": "theirs"}], lr=0.1)
        self.defaults["backend"] = "theirs"


def test_the_wrapper_leaves_a_bases_own_option_alone() -> None:
    params = parameters()
    optimizer = AGC(WithBackend(params))
    train(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["backend"] == "theirs"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_wrapper_raises_before_anything_is_clipped(value: float) -> None:
    params = parameters()
    optimizer = wrapped_sgd(params, nonfinite="raise")
    train(optimizer, params, range(1))
    set_grads(params, 1)
    assert params[1].grad is not None
    params[1].grad.view(-1)[1] = value
    with nothing_changes(params, optimizer), pytest.raises(RuntimeError, match="parameter 1 of"):
        optimizer.step()


def test_the_wrapper_cannot_skip_units() -> None:
    with pytest.raises(ValueError, match="skip_unit") as caught:
        wrapped_sgd(parameters(), nonfinite="skip_unit")
    assert_says(caught.value, "AGC", "'raise'", "SGD_AGC")


def test_the_wrappers_backend_reaches_the_clipping() -> None:
    params = parameters([(4, 3)])
    optimizer = wrapped_sgd(params, backend="triton", clipping=0.01)
    train(optimizer, params, range(1))
    assert vars(optimizer)["_clipper"]._triton.plan is not None


@pytest.mark.parametrize("given", [(0.5,), (0.5, 0.1), (0.5, 0.1, 1)])
def test_options_by_position_are_deprecated_in_the_wrapper(given: tuple[Any, ...]) -> None:
    names = dict(zip(("clipping", "agc_eps", "unit_dim"), given, strict=False))
    by_name = AGC(SGD(parameters([(4, 3)])), **names)
    with pytest.warns(DeprecationWarning, match=r"AGC\(optimizer, clipping=0.5") as caught:
        by_position = AGC(SGD(parameters([(4, 3)])), *given)
    assert caught[0].filename == __file__
    assert same(by_position.state_dict(), by_name.state_dict())


def test_options_by_position_and_by_name_at_once() -> None:
    with pytest.raises(TypeError, match="two values for clipping"):
        AGC(SGD(parameters()), 0.5, clipping=0.1)
    with pytest.raises(TypeError, match="by name"):
        AGC(SGD(parameters()), 0.5, 0.1, 0, "torch")


def test_options_are_given_by_name() -> None:
    params = parameters()
    with pytest.raises(TypeError, match="positional"):
        adaptive_clip_grad_(params, 0.5)  # type: ignore[call-arg]  # wrong on purpose
    for cls in OURS:
        with pytest.raises(TypeError, match="positional"):
            cls(params, *range(20))
