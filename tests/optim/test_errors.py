"""What cannot work is refused with the place, the value and the remedy, and nothing has changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

from agc_triton import AGC, AdamW_AGC, adaptive_clip_grad_, unitwise_norm
from tests.support.checks import nothing_changes
from tests.support.optimizers import OURS
from tests.support.tensors import parameters, set_grads
from tests.support.training import train


def wrapped_sgd(groups: Any, **options: Any) -> Optimizer:
    return AGC(SGD(groups, lr=0.1, momentum=0.9), **options)


# The classes share their constructor.
TARGETS = [AdamW_AGC, wrapped_sgd]


# Option, value, error, what the message calls the value, remedy. The parameter has shape (4, 3).
BAD_OPTIONS: list[tuple[str, Any, type[Exception], str, str]] = [
    ("clipping", -0.1, ValueError, "-0.1", ">= 0"),
    ("clipping", math.nan, ValueError, "nan", ">= 0"),
    ("clipping", 1e39, ValueError, "1e+39", "3.4e+38"),
    ("clipping", 10**39, ValueError, f"{10**39}", "inf"),
    ("clipping", "0.1", TypeError, "str", "float or None"),
    ("clipping", True, TypeError, "bool", "float or None"),
    ("clipping", torch.tensor(0.1), TypeError, "Tensor", "float or None"),
    ("agc_eps", -0.001, ValueError, "-0.001", ">= 0"),
    ("agc_eps", math.nan, ValueError, "nan", ">= 0"),
    ("agc_eps", math.inf, ValueError, "inf", "finite"),
    ("agc_eps", 1e39, ValueError, "1e+39", "3.4e+38"),
    ("agc_eps", None, TypeError, "NoneType", "float"),
    ("agc_eps", False, TypeError, "bool", "float"),
    ("unit_dim", 1.0, TypeError, "float 1.0", "an int, a tuple"),
    ("unit_dim", True, TypeError, "bool True", "an int, a tuple"),
    ("unit_dim", "0", TypeError, "str '0'", "'tensor' or None"),
    ("unit_dim", (0, (1, 2, 3)), TypeError, "(0, (1, 2, 3))", "(int, parts) pairs"),
    ("unit_dim", (0, 0), ValueError, "(0, 0)", "twice"),
    ("unit_dim", (0, 1), ValueError, "(0, 1)", "no dimension"),
    ("unit_dim", ((0, 3),), ValueError, "((0, 3),)", "not equal"),
    ("unit_dim", 2, ValueError, "unit_dim 2 ", "-2"),
    ("unit_dim", -3, ValueError, "unit_dim -3 ", "-2"),
]
bad_options = pytest.mark.parametrize(
    ("key", "value", "error", "called", "remedy"),
    BAD_OPTIONS,
    ids=[f"{key}={value}" for key, value, *_ in BAD_OPTIONS],
)
all_targets = pytest.mark.parametrize("target", TARGETS)


def assert_says(error: Exception, *parts: str) -> None:
    missing = [part for part in parts if part not in str(error)]
    assert not missing, f"{missing} not in {str(error)!r}"


@bad_options
@all_targets
def test_bad_option_of_the_constructor(
    target: Any, key: str, value: Any, error: Any, called: str, remedy: str
) -> None:
    params = parameters([(4, 3)])
    with nothing_changes(params), pytest.raises(error) as caught:
        target(params, **{key: value})
    assert_says(caught.value, key, called, remedy, "group 0")


@bad_options
@all_targets
def test_bad_option_of_a_group(
    target: Any, key: str, value: Any, error: Any, called: str, remedy: str
) -> None:
    params = parameters([(4, 3), (4, 3)])
    with nothing_changes(params), pytest.raises(error) as caught:
        target([{"params": params[:1]}, {"params": params[1:], key: value}])
    assert_says(caught.value, key, called, remedy, "group 1")


@bad_options
@all_targets
def test_bad_option_of_an_added_group(
    target: Any, key: str, value: Any, error: Any, called: str, remedy: str
) -> None:
    params = parameters([(4, 3), (4, 3)])
    optimizer = target(params[:1])
    train(optimizer, params, range(2))
    with nothing_changes(params, optimizer), pytest.raises(error) as caught:
        optimizer.add_param_group({"params": params[1:], key: value})
    assert_says(caught.value, key, called, remedy, "group 1")
    train(optimizer, params, range(2, 3))


@bad_options
@all_targets
def test_bad_option_set_between_steps(
    target: Any, key: str, value: Any, error: Any, called: str, remedy: str
) -> None:
    params = parameters([(4, 3), (4, 3)])
    optimizer = target([{"params": [p]} for p in params])
    train(optimizer, params, range(2))
    optimizer.param_groups[1][key] = value
    with nothing_changes(params, optimizer), pytest.raises(error) as caught:
        optimizer.step()
    assert_says(caught.value, key, called, remedy, "group 1")
    optimizer.param_groups[1][key] = optimizer.defaults[key]
    train(optimizer, params, range(2, 3))


@bad_options
def test_bad_option_of_the_functional(
    key: str, value: Any, error: Any, called: str, remedy: str
) -> None:
    params = parameters([(5,), (4, 3)])
    set_grads(params, 0)
    with nothing_changes(params), pytest.raises(error) as caught:
        adaptive_clip_grad_(params, **{key: value})
    assert_says(caught.value, key, called, remedy)


@bad_options
def test_bad_option_of_the_wrapper_leaves_the_base_alone(
    key: str, value: Any, error: Any, called: str, remedy: str
) -> None:
    params = parameters([(4, 3)])
    base = SGD(params)
    with nothing_changes(params, base), pytest.raises(error) as caught:
        AGC(base, **{key: value})
    assert_says(caught.value, key, called, remedy, "group 0")


def test_unitwise_norm_names_the_shape_and_the_range_of_unit_dim() -> None:
    with pytest.raises(ValueError, match="unit_dim") as caught:
        unitwise_norm(torch.ones(4, 3), 2)
    assert_says(caught.value, "unit_dim 2 ", "(4, 3)", "-2")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@all_targets
def test_a_group_whose_check_fails_is_not_added(
    target: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters([(4, 3), (4, 3)])
    optimizer = target(params[:1])

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for module in ("optimizer", "wrapper"):
        monkeypatch.setattr(f"agc_triton.optim.{module}.check_group", fail)
    with nothing_changes(params, optimizer), pytest.raises(error):
        optimizer.add_param_group({"params": params[1:]})


@pytest.mark.parametrize("backend", ["cuda", "Triton", "", None, True])
def test_unknown_backends(backend: Any) -> None:
    params = parameters()
    set_grads(params, 0)
    for use in (*OURS, adaptive_clip_grad_):
        with nothing_changes(params), pytest.raises(ValueError, match="backend") as caught:
            use(params, backend=backend)
        assert_says(caught.value, repr(backend), "auto", "triton", "torch")


def test_backend_triton_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "triton cannot be imported (No module named 'triton')"
    monkeypatch.setattr("agc_triton.routing.kernels_missing", lambda: reason)
    params = parameters()
    set_grads(params, 0)
    for use in (*OURS, adaptive_clip_grad_):
        with nothing_changes(params), pytest.raises(RuntimeError, match="triton") as caught:
            use(params, backend="triton")
        assert_says(caught.value, "backend='triton'", reason, "backend='torch'")
        use(params, backend="auto")


@all_targets
def test_a_closure_that_raises_leaves_the_optimizer_alone(target: Any) -> None:
    params = parameters([(4, 3)])
    optimizer = target(params)
    train(optimizer, params, range(1))

    def closure() -> float:
        raise KeyError("no batch")

    with nothing_changes(params, optimizer), pytest.raises(KeyError, match="no batch"):
        optimizer.step(closure)
    train(optimizer, params, range(1, 2))
