"""Steady steps wait for nothing and compile nothing; the host may run ahead of the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from agc_triton import AdamW_AGC
from tests.support.checks import oracle_for, states_of
from tests.support.cuda import (
    capturable,
    cuda_weights,
    every_rule,
    needs_gpu,
    no_host_sync,
)
from tests.support.optimizers import CLIPPING, STATEFUL, TRITON, build
from tests.support.places import KERNELS
from tests.support.tensors import (
    assign,
    grads_like,
    set_grads,
)

pytestmark = needs_gpu


@pytest.mark.parametrize("unscale_first", [False, True])
@every_rule
def test_grad_scaler_without_host_syncs(name: str, unscale_first: bool) -> None:
    options = {**STATEFUL[name], **TRITON, "backend": "auto"}
    params = cuda_weights()
    optimizer: Any = build(name, params, options)
    oracle = oracle_for(name, params, KERNELS, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12, growth_interval=100)
    scaler.scale(torch.ones((), device="cuda"))
    for seed, scale in enumerate((2.0**12, 2.0**12, 2.0**12, 2.0**11)):
        grads = grads_like(params, seed)
        assign(params, [grad * scale for grad in grads])
        if seed == 2:
            assert params[2].grad is not None
            params[2].grad[1, 699] = torch.inf
        else:
            oracle.step(grads)
        if seed == 0:  # the plan is made, and kernels are compiled
            scaler.step(optimizer)
            scaler.update()
        else:
            with no_host_sync():
                if unscale_first:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        oracle.check(params, states_of(optimizer, params))
    assert scaler.get_scale() == 2.0**11


@every_rule
def test_steady_steps_without_host_syncs(name: str) -> None:
    options = {**STATEFUL[name], **TRITON, "backend": "auto"}
    params = cuda_weights()
    optimizer = build(name, params, options)
    oracle = oracle_for(name, params, KERNELS, **options)
    grads = [grads_like(params, seed) for seed in range(4)]
    for seed, rate in enumerate((0.5, 0.5, 0.25, 0.125)):
        optimizer.param_groups[0]["lr"] = oracle.options["lr"] = rate
        assign(params, grads[seed])
        if seed == 2:
            params[1].grad = None
        oracle.step([p.grad for p in params])
        with nullcontext() if seed == 0 else no_host_sync():
            optimizer.step()
        oracle.check(params, states_of(optimizer, params))


def test_steady_steps_with_hyperparameters_on_the_device_without_host_syncs() -> None:
    options = {**capturable("AdamW"), "betas": tuple(torch.tensor([0.8, 0.9]).cuda().unbind())}
    params = cuda_weights()
    optimizer = build("AdamW", params, options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    for seed, rate in enumerate((0.5, 0.25)):
        set_grads(params, seed)
        oracle.options["lr"] = rate
        oracle.step(grads_like(params, seed))
        options["lr"].fill_(rate)
        with nullcontext() if seed == 0 else no_host_sync():
            optimizer.step()
        oracle.check(params, states_of(optimizer, params))


def test_tables_are_not_rewritten_while_they_are_copied() -> None:
    params = cuda_weights()
    options = {**STATEFUL["AdamW"], **TRITON}
    optimizer = build("AdamW", params, options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    grads = [grads_like(params, seed) for seed in range(5)]
    for seed, rate in enumerate((0.5, 0.25, 0.125, 0.75, 0.3)):
        oracle.options["lr"] = rate
        oracle.step(grads[seed])
    assign(params, grads[0])
    optimizer.step()
    # The host runs ahead by all the steps below.
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # torch's
    for seed, rate in enumerate((0.25, 0.125, 0.75, 0.3), 1):
        optimizer.param_groups[0]["lr"] = rate
        assign(params, grads[seed])
        optimizer.step()
    oracle.check(params, states_of(optimizer, params))


@every_rule
def test_nothing_is_compiled_while_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    params = cuda_weights()
    optimizer = build(name, params, {**STATEFUL[name], **TRITON})
    compiled: list[str] = []

    def count(**info: Any) -> None:
        compiled.append(info["repr"])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", count)
    for seed in range(6):
        group = optimizer.param_groups[0]
        group["lr"] = 1.0 / (seed + 1)  # 1.0 first, which Triton would make a constant
        if "betas" in group:
            group["betas"] = (0.5 + 0.05 * seed, 0.9 + 0.01 * seed)
        group["clipping"] = CLIPPING * (seed + 1)
        set_grads(params, seed)
        if seed == 4:
            params[1].grad = None
        optimizer.step()
        if seed == 1:
            compiled.clear()
    assert compiled == []


def test_a_dropped_plan_is_read_to_the_end_on_another_stream() -> None:
    params = cuda_weights()
    options = {**STATEFUL["AdamW"], "clipping": CLIPPING}
    optimizer = AdamW_AGC(params, **options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    for seed in range(6):
        grads = grads_like(params, seed)
        assign(params, grads)
        oracle.step(grads)
        if seed % 2 == 0:  # makes the plan here
            optimizer.step()
            continue
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
        optimizer._paths.release()
        filler = [torch.full((n,), -1, device="cuda") for n in (16, 64, 256, 1024) * 16]
        torch.cuda.current_stream().wait_stream(stream)
        del filler
    oracle.check(params, states_of(optimizer, params))
