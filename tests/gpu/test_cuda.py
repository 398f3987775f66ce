"""What only a GPU shows: devices beside each other, memory, bf16 rounding.

With a GPU the other tests of the Triton path run on it as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton import SGD_AGC, AdamW_AGC, adaptive_clip_grad_
from tests.support.checks import check_clipped, oracle_for, states_of
from tests.support.cuda import (
    capturable,
    cuda_weights,
    needs_gpu,
)
from tests.support.optimizers import CLIPPING, STATEFUL, TRITON, build
from tests.support.places import CPU, KERNELS, Place
from tests.support.plans import plan_of
from tests.support.tensors import (
    TILE_SHAPES,
    grad_like,
    grads_like,
    set_grads,
    weight,
    weights,
)

pytestmark = needs_gpu


def test_a_learning_rate_that_moves_on_the_device() -> None:
    options = capturable("AdamW")
    params = cuda_weights()
    optimizer = build("AdamW", params, options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    left = options["lr"].detach()
    for seed, rate in enumerate((0.5, 0.125)):
        options["lr"].data = torch.full_like(left, rate)
        oracle.options["lr"] = rate
        set_grads(params, seed)
        oracle.step(grads_like(params, seed))
        optimizer.step()
        oracle.check(params, states_of(optimizer, params))


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
    on_gpu, on_cpu = cuda_weights(), weights(TILE_SHAPES)
    options = {**STATEFUL["AdamW"], "clipping": CLIPPING}
    optimizer = AdamW_AGC([*on_gpu, *on_cpu], **options)
    ours = oracle_for("AdamW", on_gpu, KERNELS, **options)
    theirs = oracle_for("AdamW", on_cpu, CPU, **options)
    for seed in range(2):
        set_grads(on_gpu, seed)
        set_grads(on_cpu, seed)
        for oracle in (ours, theirs):
            oracle.step(grads_like(on_cpu, seed))
        optimizer.step()
        ours.check(on_gpu, states_of(optimizer, on_gpu))
        theirs.check(on_cpu, states_of(optimizer, on_cpu))
    (part,) = plan_of(optimizer).parts
    assert len(part.entries) == len(on_gpu)


def test_parameters_move_to_the_cpu_and_back() -> None:
    params = cuda_weights()
    options = {**STATEFUL["AdamW"], "clipping": CLIPPING}
    optimizer = AdamW_AGC(params, **options)
    oracle = oracle_for("AdamW", params, KERNELS, **options)
    for seed, device in enumerate(("cuda", "cpu", "cuda")):
        saved = optimizer.state_dict()
        for p in params:
            p.grad = None
            p.data = p.data.to(device)
        optimizer.load_state_dict(saved)  # moves states to their parameters
        set_grads(params, seed)
        oracle.step(grads_like(params, seed))
        optimizer.step()
        oracle.check(params, states_of(optimizer, params))
        assert (optimizer._paths.triton.plan is not None) == (device == "cuda")


def gaps() -> Tensor:
    param = weight((3, 20), device="cuda")[:, ::2]
    param.grad = grad_like(param)
    return param


def test_a_parameter_with_gaps_takes_the_torch_path_with_one_warning() -> None:
    params = [gaps(), weight((3, 20), device="cuda")]
    params[1].grad = grad_like(params[1])
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "clipping": CLIPPING}
    optimizer = SGD_AGC(params, **options)
    oracles = [
        oracle_for("SGD", params[:1], Place("torch", "cuda"), **options),
        oracle_for("SGD", params[1:], KERNELS, **options),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step()
    for oracle, param in zip(oracles, params, strict=True):
        for _ in range(2):
            oracle.step([param.grad])
        oracle.check([param], states_of(optimizer, [param]))
    (warning,) = caught
    assert "takes the torch path, which is slower: it is not dense in" in str(warning.message)
    assert len(plan_of(optimizer).parts[0].entries) == 1


def test_a_sparse_gradient_takes_the_torch_path_with_one_warning() -> None:
    param = weight((3, 20), device="cuda")
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
    param = weight((3, 20), device="cuda:1")
    grad = grad_like(param)
    param.grad = grad.clone()
    adaptive_clip_grad_([param], clipping=CLIPPING)
    check_clipped(param, grad, param.grad)
    options: dict[str, Any] = {**STATEFUL["AdamW"], **TRITON}
    lr = torch.tensor(0.5, device="cuda:0")
    optimizer = build("AdamW", [param], {**options, "lr": lr, "capturable": True})
    oracle = oracle_for("AdamW", [param], KERNELS, **{**options, "lr": 0.5})
    for rate in (0.5, 0.125):
        oracle.options["lr"] = rate
        lr.fill_(rate)
        param.grad = grad.clone()
        oracle.step([grad])
        optimizer.step()
        oracle.check([param], states_of(optimizer, [param]))
