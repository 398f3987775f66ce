"""Gradients, parameters and objects that cannot be clipped are refused, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Linear, Parameter
from torch.optim import SGD, Optimizer

from agc_triton import AGC, SGD_AGC, AdamW_AGC, adaptive_clip_grad_
from tests.optim.test_errors import assert_says, wrapped_sgd
from tests.support.checks import nothing_changes
from tests.support.optimizers import OURS, PAIRS
from tests.support.tensors import parameters, same, set_grads
from tests.support.training import train

TARGETS = [*OURS, wrapped_sgd]


def two_groups() -> list[dict[str, Any]]:
    """A parameter each, named; a test spoils the second."""
    good, bad = parameters([(4, 3), (4, 3)])
    return [{"params": [("good", good)]}, {"params": [("bad", bad)]}]


all_targets = pytest.mark.parametrize("target", TARGETS)


def other_kind(param: Parameter) -> None:
    param.data = param.data.to(torch.complex64)


def other_shape(param: Parameter) -> None:
    param.data = torch.ones(2, 6)


def sparse(param: Parameter) -> None:
    param.grad = torch.ones(4, 3).to_sparse(1)


def sparse_in_both_dimensions(param: Parameter) -> None:
    param.grad = torch.ones(4, 3).to_sparse()


def sparse_cubes(param: Parameter) -> None:
    param.data = torch.ones(4, 3, 2)
    param.grad = torch.ones(4, 3, 2).to_sparse(1)


def expanded(param: Parameter) -> None:
    # Its rows are one row in memory: it cannot be written to.
    param.grad = torch.full((1, 3), 100.0).expand(4, 3)


def overlapping(param: Parameter) -> None:
    param.grad = torch.full((9,), 100.0).as_strided((4, 3), (2, 1))


def fsdp1(param: Parameter) -> None:
    param.data = param.detach().clone()  # it lies in a flat parameter from then on
    param._is_flat_param = True  # type: ignore[attr-defined]  # as FSDP1's FlatParameter


def fsdp1_original(param: Parameter) -> None:
    param.data = param.detach().clone()
    param._fsdp_flattened = True  # type: ignore[attr-defined]  # as FSDP1 with use_orig_params


DIFFERENT: list[Any] = [
    (other_kind, RuntimeError, ("dtype", "torch.float32", "torch.complex64", "make them equal")),
    (other_shape, RuntimeError, ("shape", "[4, 3]", "[2, 6]", "make them equal")),
    (fsdp1, TypeError, ("FSDP1", "fully_shard", "clipping=0")),
    (fsdp1_original, TypeError, ("FSDP1", "fully_shard", "clipping=0")),
]


DENSE_ONLY: list[Any] = [
    (spoil, RuntimeError, ("sparse", "agc_triton.AGC", "clipping=0"))
    for spoil in (sparse, sparse_in_both_dimensions, sparse_cubes)
]


IN_PLACE: list[Any] = [
    (sparse_in_both_dimensions, RuntimeError, ("sparse", "row-sparse", "clipping=0")),
    (sparse_cubes, RuntimeError, ("sparse", "row-sparse", "clipping=0")),
    (expanded, RuntimeError, ("gradient", "clone")),
    (overlapping, RuntimeError, ("gradient", "clone")),
]


@pytest.mark.parametrize(("spoil", "error", "parts"), DIFFERENT + DENSE_ONLY)
@pytest.mark.parametrize("cls", [cls for cls in OURS if not cls.rule.sparse])
def test_gradients_that_a_class_cannot_clip(
    cls: Any, spoil: Any, error: Any, parts: tuple[str, ...]
) -> None:
    check_refused(cls(two_groups()), spoil, error, parts)


@pytest.mark.parametrize(("spoil", "error", "parts"), DIFFERENT + IN_PLACE[:2])
@pytest.mark.parametrize("cls", [cls for cls in OURS if cls.rule.sparse])
def test_gradients_that_a_class_that_takes_sparse_ones_cannot_clip(
    cls: Any, spoil: Any, error: Any, parts: tuple[str, ...]
) -> None:
    check_refused(cls(two_groups()), spoil, error, parts)


@pytest.mark.parametrize(("spoil", "error", "parts"), DIFFERENT + IN_PLACE)
def test_gradients_that_the_wrapper_cannot_clip(
    spoil: Any, error: Any, parts: tuple[str, ...]
) -> None:
    check_refused(wrapped_sgd(two_groups()), spoil, error, parts)


def check_refused(
    optimizer: Optimizer, spoil: Callable[[Parameter], None], error: Any, parts: tuple[str, ...]
) -> None:
    params = [group["params"][0] for group in optimizer.param_groups]
    train(optimizer, params, range(1))
    set_grads(params, 1)
    spoil(params[1])
    with nothing_changes(params, optimizer), pytest.raises(error) as caught:
        optimizer.step()
    shape = str(tuple(params[1].shape))
    assert_says(caught.value, "parameter 0 ('bad') of group 1", shape, *parts)


@pytest.mark.parametrize(("spoil", "error", "parts"), DIFFERENT + IN_PLACE)
def test_gradients_that_the_functional_cannot_clip(
    spoil: Any, error: Any, parts: tuple[str, ...]
) -> None:
    params = parameters([(4, 3), (4, 3)])
    set_grads(params, 0)
    spoil(params[1])
    with nothing_changes(params), pytest.raises(error) as caught:
        adaptive_clip_grad_(params)
    assert_says(caught.value, "parameter 1", *parts)


def test_sparse_rows_with_units_in_columns() -> None:
    groups = two_groups()
    optimizer = wrapped_sgd(groups, unit_dim=1)
    check_refused(optimizer, sparse, RuntimeError, ("unit_dim 0", "clipping=0"))


@pytest.mark.parametrize("flag", [fsdp1, fsdp1_original])
@all_targets
def test_flat_parameters_are_refused_at_once(target: Any, flag: Any) -> None:
    groups = two_groups()
    flag(groups[1]["params"][0][1])
    with pytest.raises(TypeError, match="fully_shard") as caught:
        target(groups)
    assert_says(caught.value, "parameter 0 ('bad') of group 1", "clipping=0")
    groups = two_groups()
    flag(groups[1]["params"][0][1])
    groups[1]["clipping"] = 0
    target(groups)


@pytest.mark.parametrize("cls", PAIRS)
def test_a_sparse_gradient_without_clipping_is_torchs_matter(cls: Any) -> None:
    def step(optimizer: Optimizer) -> Any:
        (param,) = optimizer.param_groups[0]["params"]
        sparse(param)
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        return param.detach()

    ours, theirs = PAIRS[cls](parameters([(4, 3)]), clipping=0), cls(parameters([(4, 3)]))
    assert same(step(ours), step(theirs))


def without_defaults() -> Optimizer:
    """As torch.distributed.optim.PostLocalSGDOptimizer."""

    class PostLocalSGDOptimizer(Optimizer):
        def __init__(self, optim: Optimizer) -> None:
            self.optim, self.param_groups = optim, optim.param_groups

    return PostLocalSGDOptimizer(SGD(parameters()))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (lambda: Linear(2, 2), ("torch.optim.Optimizer", "Linear")),
        (lambda: parameters(), ("torch.optim.Optimizer", "list")),
        (lambda: SGD, ("torch.optim.Optimizer", "type")),
        (lambda: SGD_AGC(parameters()), ("SGD_AGC", "already clips")),
        (lambda: AdamW_AGC(parameters()), ("AdamW_AGC", "already clips")),
        (lambda: AGC(SGD(parameters())), ("AGC", "already clips")),
        (without_defaults, ("PostLocalSGDOptimizer", "defaults", "inner optimizer")),
    ],
    ids=["module", "parameters", "class", "SGD_AGC", "AdamW_AGC", "AGC", "no defaults"],
)
def test_what_the_wrapper_does_not_wrap(given: Callable[[], Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        AGC(given())
    assert_says(caught.value, *parts)


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (lambda module: module.named_parameters(), "tuple"),
        (lambda module: dict(module.named_parameters()), "str"),
        (lambda module: module, "Linear"),
        (lambda module: [module], "Linear"),
        (lambda module: None, "NoneType"),
    ],
    ids=["names", "dict", "module", "modules", "None"],
)
def test_what_the_functional_cannot_clip_at_all(
    given: Callable[[Linear], Any], called: str
) -> None:
    module = Linear(2, 2)
    params = list(module.parameters())
    set_grads(params, 0)
    with nothing_changes(params), pytest.raises(TypeError) as caught:
        adaptive_clip_grad_(given(module))
    assert_says(caught.value, f"not {called}", "model.parameters()")


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip_unit"])
def test_the_way_round_a_sparse_gradient_works(nonfinite: str) -> None:
    optimizer = SGD_AGC(parameters([(4, 3)]), lr=0.1, nonfinite=nonfinite)
    (param,) = optimizer.param_groups[0]["params"]
    sparse(param)
    with pytest.raises(RuntimeError, match="sparse") as caught:
        optimizer.step()
    optimizer.param_groups[0]["clipping"] = 0
    if nonfinite == "skip_unit":
        assert_says(caught.value, "clipping=0", "nonfinite='propagate'")
        optimizer.nonfinite = "propagate"
    optimizer.step()
