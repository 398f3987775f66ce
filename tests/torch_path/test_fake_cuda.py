"""The torch path on CUDA tensors that are not there; torch's fake ones know their devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import agc_triton
from agc_triton import AGC, adaptive_clip_grad_, unitwise_norm
from tests.support.formulas import SCALARS
from tests.support.optimizers import EACH_WAY, takes

MODES: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"fused": False},
    {"clipping": 0},
    {"differentiable": True},
    {"maximize": True},
]


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def on_gpu() -> list[Tensor]:
    kinds = [((3, 4), torch.float32), ((5,), torch.float32), ((2, 3, 2, 2), torch.bfloat16)]
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in kinds]


def add_grads(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.empty_like(p)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", EACH_WAY)
def test_all_that_a_step_makes_lies_with_its_parameter(name: str, mode: dict[str, Any]) -> None:
    if "fused" in mode and not takes(name, "fused"):
        mode = {}  # it has no such argument
    params = on_gpu()
    # Builds without CUDA cannot copy SGD's first buffer.
    momentum = {"momentum": 0.9} if name == "RMSprop" else {}
    make = getattr(agc_triton, f"{name}_AGC")
    optimizer = make(params, lr=0.1, backend="torch", **momentum, **mode)
    for _ in range(2):
        add_grads(params)
        optimizer.step()
    for state in optimizer.state.values():
        assert {t.device.type for key, t in state.items() if key not in SCALARS} == {"cuda"}
        assert state.get("step", torch.empty((), device="cpu")).device.type == "cpu"


def test_clipping_alone() -> None:
    params = on_gpu()
    add_grads(params)
    adaptive_clip_grad_(params, backend="torch")
    assert all(unitwise_norm(p).device.type == "cuda" for p in params)


def test_the_wrapper() -> None:
    params = on_gpu()
    optimizer = AGC(torch.optim.SGD(params, lr=0.1))
    for group in optimizer.param_groups:
        group["foreach"] = False
    add_grads(params)
    with pytest.warns(UserWarning, match=r"torch path.*a FakeTensor is not a plain tensor"):
        optimizer.step()
