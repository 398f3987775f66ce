"""What AGC asks of an optimizer that it wraps, said before a gradient is clipped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from agc_triton.validation import tensor_name

# Of sharpness-aware optimizers, which step on weights that they have moved: nothing calls `step`.
_OTHER_STEPS = ("first_step", "second_step", "perturb_weights")

# What torch's own say in the middle of a step, or never, where groups were added later.
_TAKE_SPARSE = ("Adagrad", "LBFGS", "SGD", "SparseAdam")
_REFUSE_COMPLEX = ("Adafactor", "Muon", "SparseAdam")


def check_base(optimizer: Optimizer) -> None:
    """Check that what is wrapped has what AGC needs, and that all its updates are seen.

    Raises:
        TypeError: it has not, or they are not.
        ValueError: a parameter that it cannot step.
    """
    called = type(optimizer).__name__
    for name in ("param_groups", "defaults"):
        if not hasattr(optimizer, name):
            raise TypeError(
                f"{called} has no {name}, which AGC writes its settings to; wrap the inner"
                " optimizer instead"
            )
    if others := [name for name in _OTHER_STEPS if hasattr(optimizer, name)]:
        raise TypeError(
            f"{called} updates in {' and '.join(others)} as well as in step, and AGC would not clip"
            f" there; give it a base that clips: {called}(params, agc_triton.SGD_AGC, ...)"
        )
    for index, group in enumerate(optimizer.param_groups):
        check_steppable(optimizer, group, index)


def check_steppable(optimizer: Optimizer, group: Mapping[str, Any], index: int) -> None:
    """Check that one of torch's own can step the parameters of this group of its.

    Raises:
        ValueError: it cannot.
    """
    name = _of_torch(optimizer)
    if name == "LBFGS" and index:
        raise ValueError(
            f"LBFGS steps its first group only, and would ignore group {index}; give it all"
            " parameters in one group"
        )
    for i, param in enumerate(group["params"]):
        if name in _REFUSE_COMPLEX and param.is_complex():
            refused = "does not support complex parameters, as"
        elif name == "Muon" and not is_lazy(param) and param.dim() != 2:
            refused = "steps matrices only, not"
        else:
            continue
        raise ValueError(
            f"{name} {refused} {tensor_name(group, index, i)}; give it to another"
            " optimizer, such as agc_triton.AdamW_AGC"
        )


def check_closure(optimizer: Optimizer) -> None:
    """Check that an optimizer steps without a closure.

    Raises:
        TypeError: it does not.
    """
    if _needs_closure(type(optimizer).step):
        called = type(optimizer).__name__
        raise TypeError(
            f"{called} evaluates the model by itself: call step(closure), with a closure that"
            " zeroes the gradients, calls backward() and returns the loss (GradScaler has none to"
            " give: train without it)"
        )


@functools.lru_cache(maxsize=32)
def _needs_closure(step: Callable[..., Any]) -> bool:
    arguments = list(inspect.signature(step).parameters.values())[1:2]
    return any(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments)


def check_layouts(optimizer: Optimizer) -> None:
    """Check that one of torch's own takes gradients that are sparse, or dense, as these are.

    Raises:
        RuntimeError: it does not.
    """
    name = _of_torch(optimizer)
    if not name:
        return
    remedies = {}
    if name == "SparseAdam":
        remedies["dense"] = "give it to another optimizer, such as agc_triton.Adam_AGC"
    if name not in _TAKE_SPARSE:
        remedies["sparse"] = "wrap torch.optim's SparseAdam, SGD or Adagrad, or make it dense"
    for index, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            kind = "dense" if param.grad.layout is torch.strided else "sparse"
            if kind in remedies:
                called = type(optimizer).__name__
                raise RuntimeError(
                    f"{called} does not support {kind} gradients, as of"
                    f" {tensor_name(group, index, i)}; {remedies[kind]}"
                )


def _of_torch(optimizer: Optimizer) -> str:
    """The class of torch.optim whose ``step`` an optimizer has; of others, nothing is known."""
    step = type(optimizer).step
    return step.__qualname__.split(".")[0] if steps_as_torch(optimizer) else ""


def steps_as_torch(optimizer: Optimizer) -> bool:
    """Whether an optimizer has the ``step`` of one of torch's own."""
    return type(optimizer).step.__module__.startswith("torch.optim.")
