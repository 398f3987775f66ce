"""Bit for bit what torch.optim does, over every configuration that torch tests its own with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import optim_db

import agc_triton
import agc_triton.reference
from tests.cases import NAMES
from tests.helpers import make_params, random_grad, same

STEPS = 3
SHAPES = ((6, 5), (4, 3, 2, 2), (6,), (4, 1, 1, 1), (), (17, 3))
INFOS: dict[str, Any] = {info.name: info for info in optim_db if info.name in NAMES}
FLAGS = ("foreach", "fused", "differentiable")
# No gradient reaches this limit, and fp32 holds it.
UNREACHED = 1e30


def configurations(explicit: bool) -> Iterator[Any]:
    """torch's own, CUDA's among them, times the modes; without the modes that torch picks itself."""
    for name, info in INFOS.items():
        inputs = info.optim_inputs_func(device="cuda")
        modes: list[dict[str, bool]] = [] if explicit else [{}]
        modes += [{flag: False for flag in FLAGS if flag in info.supported_impls}]
        modes += [{flag: True} for flag in info.supported_impls]
        for options in inputs:
            for mode in modes:
                label = ", ".join(f"{key}={value}" for key, value in mode.items())
                yield pytest.param(
                    name, {**options.kwargs, **mode}, id=f"{name}: {options.desc}: {label}"
                )


def run(cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> Iterator[Any]:
    """Parameters, gradients and states after each step, or the error that ends it."""
    params: list[Any] = [p.detach() for p in make_params(SHAPES, dtype)]
    if not options.get("differentiable"):
        params = [p.requires_grad_() for p in params]
    try:
        optimizer = cls(params, **copy.deepcopy(options))
        for step in range(STEPS):
            for i, param in enumerate(params):
                late = options.get("fused") and cls.__name__.startswith("SGD")
                present = i != 1 or step != 0 or late
                param.grad = random_grad(param.detach(), 10 * step + i) if present else None
            optimizer.step()
            values = [(p.detach(), p.grad, optimizer.state.get(p, {})) for p in params]
            yield copy.deepcopy(values), optimizer.param_groups[0]
    except (AssertionError, RuntimeError, ValueError) as error:
        yield type(error), str(error)
