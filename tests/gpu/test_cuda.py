"""What only a GPU shows: host syncs, compilations, memory, bf16 rounding.

With a GPU the other tests of the Triton path run on it as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton import SGD_AGC, AdamW_AGC, adaptive_clip_grad_, routing
from tests.support.cases import STATEFUL, build
from tests.support.cuda_cases import (
    capturable,
    every_rule,
    make_grads,
    make_params,
    needs_gpu,
    set_grads,
)
from tests.support.oracle import Oracle
from tests.support.tolerances import TOLERANCES
from tests.support.triton_cases import (
    CLIPPING,
    TRITON,
    KernelOracle,
    check_clipped,
    make_grad,
    make_weight,
    plan_of,
    states_of,
)

pytestmark = needs_gpu


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_learning_rate_that_moves_on_the_device() -> None:
    options = capturable("AdamW")
    params = make_params()
    optimizer, oracle = build("AdamW", params, options), KernelOracle("AdamW", params, **options)
    left = options["lr"].detach()
    for seed, rate in enumerate((0.5, 0.125)):
        options["lr"].data = torch.full_like(left, rate)
        oracle.options["lr"] = rate
        set_grads(params, make_grads(seed))
        oracle.step(make_grads(seed))
        optimizer.step()
        oracle.check(params, states_of(optimizer, params))


@pytest.mark.parametrize("unscale_first", [False, True])
@every_rule
def test_grad_scaler_without_host_syncs(name: str, unscale_first: bool) -> None:
    options = {**STATEFUL[name], **TRITON, "backend": "auto"}
    params = make_params()
    optimizer: Any = build(name, params, options)
    oracle = KernelOracle(name, params, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12, growth_interval=100)
    scaler.scale(torch.ones((), device="cuda"))
    for seed, scale in enumerate((2.0**12, 2.0**12, 2.0**12, 2.0**11)):
        grads = make_grads(seed)
        set_grads(params, [grad * scale for grad in grads])
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
    params = make_params()
    optimizer = build(name, params, options)
    oracle = KernelOracle(name, params, **options)
    grads = [make_grads(seed) for seed in range(4)]
    for seed, rate in enumerate((0.5, 0.5, 0.25, 0.125)):
        optimizer.param_groups[0]["lr"] = oracle.options["lr"] = rate
        set_grads(params, grads[seed])
        if seed == 2:
            params[1].grad = None
        oracle.step([p.grad for p in params])
        if seed == 0:
            optimizer.step()
        else:
            with no_host_sync():
                optimizer.step()
        oracle.check(params, states_of(optimizer, params))


def test_steady_steps_with_hyperparameters_on_the_device_without_host_syncs() -> None:
    options = {**capturable("AdamW"), "betas": tuple(torch.tensor([0.8, 0.9]).cuda().unbind())}
    params = make_params()
    optimizer, oracle = build("AdamW", params, options), KernelOracle("AdamW", params, **options)
    for seed, rate in enumerate((0.5, 0.25)):
        set_grads(params, make_grads(seed))
        oracle.options["lr"] = rate
        oracle.step(make_grads(seed))
        options["lr"].fill_(rate)
        if seed == 0:
            optimizer.step()
        else:
            with no_host_sync():
                optimizer.step()
        oracle.check(params, states_of(optimizer, params))


def test_tables_are_not_rewritten_while_they_are_copied() -> None:
    params = make_params()
    options = {**STATEFUL["AdamW"], **TRITON}
    optimizer, oracle = build("AdamW", params, options), KernelOracle("AdamW", params, **options)
    grads = [make_grads(seed) for seed in range(5)]
    for seed, rate in enumerate((0.5, 0.25, 0.125, 0.75, 0.3)):
        oracle.options["lr"] = rate
        oracle.step(grads[seed])
    set_grads(params, grads[0])
    optimizer.step()
    # The host runs ahead by all the steps below.
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # torch's
    for seed, rate in enumerate((0.25, 0.125, 0.75, 0.3), 1):
        optimizer.param_groups[0]["lr"] = rate
        set_grads(params, grads[seed])
        optimizer.step()
    oracle.check(params, states_of(optimizer, params))


@every_rule
def test_nothing_is_compiled_while_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    params = make_params()
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
        set_grads(params, make_grads(seed))
        if seed == 4:
            params[1].grad = None
        optimizer.step()
        if seed == 1:
            compiled.clear()
    assert compiled == []


def test_bf16_is_rounded_to_nearest() -> None:
    rng = torch.Generator().manual_seed(0)
    shape = (64, 512)
    weight, grad = (torch.randn(shape, generator=rng).to("cuda", torch.bfloat16) for _ in range(2))
    param = weight.clone()
    param.grad = grad
    SGD_AGC([param], lr=0.5, clipping=0, backend="triton").step()
    exact = weight.float() - 0.5 * grad.float()
    expected = exact.to(torch.bfloat16)
    assert torch.equal(param, expected)
    # Cutting bits off, as the interpreter does, is something else.
    cut = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    assert not torch.equal(expected.float(), cut)


def test_auto_takes_the_kernels_and_the_torch_path_for_what_is_on_the_cpu() -> None:
    on_gpu, on_cpu = make_params(), make_params("cpu")
    options = {**STATEFUL["AdamW"], "clipping": CLIPPING}
    optimizer = AdamW_AGC([*on_gpu, *on_cpu], **options)
    ours = KernelOracle("AdamW", on_gpu, **options)
    theirs = Oracle("AdamW", on_cpu, TOLERANCES["float32"], **options)
    for seed in range(2):
        set_grads(on_gpu, make_grads(seed))
        set_grads(on_cpu, make_grads(seed, "cpu"))
        for oracle in (ours, theirs):
            oracle.step(make_grads(seed))
        optimizer.step()
        ours.check(on_gpu, states_of(optimizer, on_gpu))
        theirs.check(on_cpu, states_of(optimizer, on_cpu))
    (part,) = plan_of(optimizer).parts
    assert len(part.entries) == len(on_gpu)


def test_parameters_move_to_the_cpu_and_back() -> None:
    params = make_params()
    options = {**STATEFUL["AdamW"], "clipping": CLIPPING}
    optimizer = AdamW_AGC(params, **options)
    oracle = KernelOracle("AdamW", params, **options)
    for seed, device in enumerate(("cuda", "cpu", "cuda")):
        saved = optimizer.state_dict()
        for p in params:
            p.grad = None
            p.data = p.data.to(device)
        optimizer.load_state_dict(saved)  # moves states to their parameters
        set_grads(params, make_grads(seed, device))
        oracle.step(make_grads(seed))
        optimizer.step()
        oracle.check(params, states_of(optimizer, params))
        assert (optimizer._paths.triton.plan is not None) == (device == "cuda")


@pytest.fixture
def warned_afresh() -> Iterator[None]:
    routing._warn_once.cache_clear()
    yield
    routing._warn_once.cache_clear()


def gaps() -> Tensor:
    param = make_weight((3, 20)).float().cuda()[:, ::2]
    param.grad = make_grad((3, 10)).float().cuda()
    return param


@pytest.mark.usefixtures("warned_afresh")
def test_a_parameter_with_gaps_takes_the_torch_path_with_one_warning() -> None:
    params = [gaps(), make_weight((3, 20)).float().cuda()]
    params[1].grad = make_grad((3, 20)).float().cuda()
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "clipping": CLIPPING}
    optimizer = SGD_AGC(params, **options)
    oracles = [
        Oracle("SGD", params[:1], TOLERANCES["float32"], **options),
        KernelOracle("SGD", params[1:], **options),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step()
    for oracle, param in zip(oracles, params, strict=True):
        for _ in range(2):
            oracle.step([param.grad])
        oracle.check([param], states_of(optimizer, [param]))
    messages = [str(w.message) for w in caught]
    assert messages == ["CUDA parameters take the torch path: it is not dense in memory"]
    assert len(plan_of(optimizer).parts[0].entries) == 1


@pytest.mark.usefixtures("warned_afresh")
def test_a_sparse_gradient_takes_the_torch_path_with_one_warning() -> None:
    param = make_weight((3, 20)).float().cuda()
    optimizer = SGD_AGC([param], lr=0.5, clipping=0)
    expected = param - 0.5 * torch.eye(3, 20, device="cuda")
    param.grad = torch.eye(3, 20, device="cuda").to_sparse()
    with pytest.warns(UserWarning, match="torch path: its gradient is sparse"):
        optimizer.step()
    assert torch.equal(param, expected)


def run_script(code: str, *prefix: str, **env: str) -> None:
    """Run it in a process of its own: an illegal access would end every later test here."""
    result = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


SCRIPT = """
import torch
from agc_triton import AdamW_AGC

def set_grads(params, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(p.device, p.dtype)

params = [torch.randn(shape, device="cuda") for shape in ((3, 20), (7,), (2, 700), (1, 2, 10245))]
"""


def test_a_learning_rate_on_the_host_of_a_capturable_optimizer() -> None:
    # torch.optim takes it; its address means nothing to the device.
    run_script(
        SCRIPT
        + """
lr = torch.tensor(0.5)
expected = [p.clone() for p in params]
ours = AdamW_AGC(params, lr=lr, capturable=True, backend="triton")
theirs = AdamW_AGC(expected, lr=0.5, backend="triton")
set_grads(params, 0), set_grads(expected, 0)
try:
    ours.step()
except (RuntimeError, ValueError) as error:
    assert "lr" in str(error) or "hyperparameter" in str(error), error
else:
    theirs.step()
    assert all(map(torch.equal, params, expected))
torch.cuda.synchronize()
"""
    )


def test_states_left_on_the_host_are_refused() -> None:
    run_script(
        SCRIPT
        + """
optimizer = AdamW_AGC(params, backend="triton")
set_grads(params, 0)
optimizer.step()
for state in optimizer.state.values():
    state["exp_avg"] = state["exp_avg"].cpu()
before = [p.clone() for p in params]
try:
    optimizer.step()
except RuntimeError as error:
    assert "device" in str(error), error
else:
    raise SystemExit("no error")
torch.cuda.synchronize()
assert all(map(torch.equal, params, before))
"""
    )


def test_compute_sanitizer_finds_nothing() -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    run_script(
        SCRIPT
        + """
params += [torch.randn(5, 3, 3, 3, device="cuda")[1:], torch.randn(9, 33, device="cuda").bfloat16()]
params[4] = params[4].clone(memory_format=torch.channels_last)
groups = [{"params": params}, {"params": [torch.randn(7, 3, 2, 2, device="cuda")], "unit_dim": 1}]
optimizer = AdamW_AGC(groups, amsgrad=True, backend="triton")
for seed in range(2):
    set_grads([p for group in groups for p in group["params"]], seed)
    optimizer.step()
torch.cuda.synchronize()
""",
        sanitizer,
        "--tool=memcheck",
        "--error-exitcode=9",
        # Each tensor in an allocation of its own, so that no access beside it goes unseen.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_clipping_and_a_learning_rate_on_another_gpu() -> None:
    param = make_weight((3, 20)).float().to("cuda:1")
    grad = make_grad((3, 20)).float().to("cuda:1")
    param.grad = grad.clone()
    adaptive_clip_grad_([param], CLIPPING)
    check_clipped(param, grad, param.grad)
    options: dict[str, Any] = {**STATEFUL["AdamW"], **TRITON}
    lr = torch.tensor(0.5, device="cuda:0")
    optimizer = build("AdamW", [param], {**options, "lr": lr, "capturable": True})
    oracle = KernelOracle("AdamW", [param], **{**options, "lr": 0.5})
    for rate in (0.5, 0.125):
        oracle.options["lr"] = rate
        lr.fill_(rate)
        param.grad = grad.clone()
        oracle.step([grad])
        optimizer.step()
        oracle.check([param], states_of(optimizer, [param]))


def test_a_dropped_plan_is_read_to_the_end_on_another_stream() -> None:
    params = make_params()
    options = {**STATEFUL["AdamW"], "clipping": CLIPPING}
    optimizer = AdamW_AGC(params, **options)
    oracle = KernelOracle("AdamW", params, **options)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
    for seed in range(6):
        grads = make_grads(seed)
        set_grads(params, grads)
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
