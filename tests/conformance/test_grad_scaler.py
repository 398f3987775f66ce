"""GradScaler's gradients are unscaled once, then clipped, by every class and every wrapped base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW

from agc_triton import AGC, SGD_AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC
from tests.support.optimizers import EACH_WAY, STATEFUL, WAY_CASES, build
from tests.support.places import DEVICE, KERNELS
from tests.support.soak import packed_blocks, soaked
from tests.support.tensors import parameters, same, set_grads, weights
from tests.support.training import train

pytestmark = pytest.mark.usefixtures("either_block")

FUSED = (SGD_AGC, Adam_AGC, AdamW_AGC)
FUSED_BASES = (SGD, Adam, AdamW, Adagrad)


def make_class(cls: Any, params: Any, fused: bool) -> Any:
    return cls(params, lr=0.1, clipping=0.02, fused=fused)


def make_rmsprop(cls: Any, params: Any, fused: bool) -> Any:
    return cls(params, lr=0.1, clipping=0.02)


def make_wrapped(cls: Any, params: Any, fused: bool) -> Any:
    return AGC(cls(params, lr=0.1, fused=fused), clipping=0.02)


every_optimizer = pytest.mark.parametrize(
    ("make", "cls", "fused"),
    [
        *((make_class, cls, fused) for cls in FUSED for fused in (False, True)),
        *((make_wrapped, cls, fused) for cls in FUSED_BASES for fused in (False, True)),
        (make_rmsprop, RMSprop_AGC, False),
    ],
)


def scaled_grads(params: Sequence[Tensor], seed: int, scaler: torch.amp.GradScaler) -> None:
    set_grads(params, seed)
    scale = scaler.scale(torch.ones(()))
    for p in params:
        assert p.grad is not None
        p.grad *= scale


@pytest.mark.parametrize("unscale_first", [False, True])
@every_optimizer
def test_gradients_are_unscaled_once_before_the_clip(
    make: Any, cls: Any, fused: bool, unscale_first: bool
) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, expected = (
        make(cls, [{"params": params[:2]}, {"params": params[2:], "clipping": 0}], fused)
        for params in (ours, theirs)
    )
    # A power of two scales exactly, so that the two runs agree to the bit.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(3):
        scaled_grads(ours, seed, scaler)
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        train(expected, theirs, range(seed, seed + 1))
    assert same(ours, theirs)
    assert same(optimizer.state_dict(), expected.state_dict())


@every_optimizer
def test_a_step_with_an_infinite_gradient_is_skipped(make: Any, cls: Any, fused: bool) -> None:
    params = parameters()
    optimizer = make(cls, params, fused)
    train(optimizer, params, range(1))
    before = copy.deepcopy((params, optimizer.state_dict()))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_grads(params, 1, scaler)
    assert params[0].grad is not None
    params[0].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert same(before, (params, optimizer.state_dict()))
    assert scaler.get_scale() == 4.0


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize(("name", "mode"), WAY_CASES)
def test_the_torch_path_leaves_unscaling_to_the_scaler(name: str, mode: str, device: str) -> None:
    params = weights(device=device)
    optimizer: Any = build(name, params, {**STATEFUL[name], "backend": "torch"}, mode)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    scaled_grads(params, 0, scaler)
    scaler.step(optimizer)
    given: list[Any] = [p.grad for p in params]
    set_grads(params, 0)
    assert same(given, [p.grad for p in params])


@pytest.mark.parametrize("mode", ["foreach", "not fused", "differentiable"])
def test_options_that_mean_the_torch_path_claim_nothing(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agc_triton.routing.kernels_missing", lambda: None)
    on_gpu: Any = parameters([(4, 3)])[0].detach().as_subclass(OnGpu)
    assert build("SGD", [on_gpu], {})._step_supports_amp_scaling  # type: ignore[attr-defined]  # torch's
    assert not build("SGD", [on_gpu], {}, mode)._step_supports_amp_scaling  # type: ignore[attr-defined]  # likewise


@packed_blocks
@pytest.mark.parametrize("name", soaked(STATEFUL, lambda name: name in EACH_WAY))
def test_the_switch_has_gradients_unscaled_before_the_kernels_run(name: str) -> None:
    ours, theirs = KERNELS.weights(), KERNELS.weights()
    options = {**STATEFUL[name], "clipping": 0.02, "backend": "triton"}
    optimizer, expected = (build(name, params, options) for params in (ours, theirs))
    optimizer.takes_scaled_grads = False  # type: ignore[attr-defined]  # ours
    optimizer = copy.deepcopy(optimizer)
    ours = optimizer.param_groups[0]["params"]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    for seed in range(2):
        scaled_grads(ours, seed, scaler)
        scaler.step(optimizer)
        scaler.update()
        train(expected, theirs, range(seed, seed + 1))
        assert same([p.grad for p in ours], [p.grad for p in theirs])
    assert same(ours, theirs)
