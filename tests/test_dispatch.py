"""Which backend steps a parameter, what is said where it cannot be the kernels, and how often."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from agc_triton import SGD_AGC, AdamW_AGC, adaptive_clip_grad_, routing
from agc_triton.snapshot import Cached
from tests.support.checks import nothing_changes
from tests.support.optimizers import OURS
from tests.support.places import DEVICE
from tests.support.tensors import grad_like, same, weight

every_class = pytest.mark.parametrize("cls", OURS)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Triton is looked for again."""
    routing.kernels_missing.cache_clear()
    yield
    routing.kernels_missing.cache_clear()


def make_param(device: str = DEVICE) -> Tensor:
    param = weight((3, 20), device=device)
    param.grad = grad_like(param)
    return param


class OnGpu(Tensor):
    """A tensor that claims to be on a GPU, and is none that the kernels take."""

    is_cuda = True


def on_gpu() -> Tensor:
    param: Tensor = make_param("cpu").as_subclass(OnGpu)
    param.grad = grad_like(param).as_subclass(OnGpu)
    return param


@every_class
def test_auto_takes_the_torch_path_on_the_cpu(cls: Any) -> None:
    param, expected = make_param("cpu"), make_param("cpu")
    for p, backend in ((param, "auto"), (expected, "torch")):
        optimizer = cls([p], lr=0.1, backend=backend)
        optimizer.step()
        assert optimizer._paths.triton.plan is None
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    assert same(param, expected)


@every_class
def test_triton_takes_the_kernels(cls: Any) -> None:
    optimizer = cls([make_param()], lr=0.1, backend="triton")
    assert optimizer._step_supports_amp_scaling
    optimizer.step()
    assert optimizer._paths.triton.plan is not None
    assert optimizer._paths.triton.plan.rest(optimizer.param_groups) == []


def test_kernels_are_imported_on_need() -> None:
    # On the CPU alone Triton is not needed.
    code = """
import sys, torch, agc_triton
param = torch.ones(3, 4)
param.grad = torch.ones(3, 4)
for make in (agc_triton.SGD_AGC, agc_triton.AdamW_AGC):
    make([param], lr=0.1).step()
agc_triton.AGC(torch.optim.SGD([param])).step()
agc_triton.adaptive_clip_grad_([param])
kernels = ("agc_triton.kernels", "agc_triton.triton_path")
assert not [name for name in sys.modules if name.startswith(kernels)]
agc_triton.AdamW_AGC([param], backend="triton")
assert "agc_triton.kernels.step" in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


CONTRADICTIONS = [
    (cls, option)
    for cls in OURS
    for option in ({"foreach": True}, {"foreach": 1}, {"differentiable": True}, {"fused": False})
    if "fused" not in option or "fused" in inspect.signature(cls).parameters
]


@pytest.mark.parametrize(("cls", "option"), CONTRADICTIONS, ids=str)
def test_options_that_mean_the_torch_path_and_backend_triton(
    cls: Any, option: dict[str, bool]
) -> None:
    ((key, value),) = option.items()
    with pytest.raises(ValueError, match=rf"{key}={value} in parameter group 0.*torch path"):
        cls([make_param()], backend="triton", **option)
    with pytest.raises(ValueError, match=rf"{key}={value} in parameter group 1"):
        cls([{"params": [make_param()]}, {"params": [make_param()], **option}], backend="triton")
    optimizer = cls([make_param()], backend="triton")
    with (
        nothing_changes(optimizer.param_groups[0]["params"], optimizer),
        pytest.raises(ValueError, match=rf"{key}={value} in parameter group 1"),
    ):
        optimizer.add_param_group({"params": [make_param()], **option})


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize(
    "option",
    [{"foreach": None}, {"foreach": False}, {"fused": None}, {"fused": True}, {"capturable": True}],
    ids=str,
)
def test_options_that_go_with_backend_triton(option: dict[str, Any]) -> None:
    optimizer = AdamW_AGC([make_param()], backend="triton", **option)
    optimizer.step()
    assert optimizer._paths.triton.plan is not None


def set_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(triton, "__version__", version)


@pytest.mark.parametrize("version", ["2.3.1", "3.5.9"])
def test_an_old_triton(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_version(monkeypatch, version)
    with pytest.raises(RuntimeError, match=rf"triton {version} is older than 3\.6"):
        AdamW_AGC([make_param()], backend="triton")
    with pytest.raises(RuntimeError, match=rf"triton {version} is older than 3\.6"):
        adaptive_clip_grad_([make_param()], backend="triton")
    AdamW_AGC([make_param("cpu")]).step()


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1+git1234", "3.10.0", "4.0"])
def test_a_recent_triton(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_version(monkeypatch, version)
    optimizer = AdamW_AGC([make_param()], backend="triton")
    optimizer.step()
    assert optimizer._paths.triton.plan is not None


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"install triton 3\.6.*backend='torch'"):
        AdamW_AGC([make_param()], backend="triton")
    param = on_gpu()
    with pytest.warns(UserWarning, match="takes the torch path.*triton"):
        SGD_AGC([param], lr=0.1).step()


def test_kernels_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if "kernels" in name:
            raise ImportError("libcuda.so is gone")
        return lookup(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"libcuda\.so is gone"):
        AdamW_AGC([make_param()], backend="triton")


def with_sparse_grad() -> Tensor:
    param = weight((3, 20), device=DEVICE)
    param.grad = torch.eye(3, 20, device=DEVICE).to_sparse()
    return param


def with_gaps() -> Tensor:
    param = weight((3, 20), device=DEVICE)[:, ::2]
    param.grad = torch.ones_like(param)
    return param


def of_a_subclass() -> Tensor:
    class Special(Tensor):
        pass

    param = make_param()
    special: Tensor = param.detach().as_subclass(Special)
    special.grad = param.grad.as_subclass(Special) if param.grad is not None else None
    return special


def of_eight_bits() -> Tensor:
    param = torch.ones(3, 4, device=DEVICE).to(torch.float8_e5m2)
    param.grad = torch.ones_like(param)
    return param


REASONS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (with_sparse_grad, "sparse"),
    "gaps": (with_gaps, "not dense"),
    "subclass": (of_a_subclass, "a Special is not a plain tensor"),
    "8 bits": (of_eight_bits, r"dtype is torch\.float8_e5m2"),
}


@pytest.mark.parametrize("clipping", [0.05, 0])
@pytest.mark.parametrize("reason", REASONS)
def test_parameters_the_kernels_cannot_take(reason: str, clipping: float) -> None:
    make, message = REASONS[reason]
    named = [("first", make_param()), ("second", make())]
    optimizer = SGD_AGC(iter(named), lr=0.1, clipping=clipping, backend="triton")
    before = named[0][1].detach().clone()
    with pytest.raises(RuntimeError, match=message) as caught:
        optimizer.step()
    assert "second" in str(caught.value)
    assert torch.equal(named[0][1], before)


def test_what_becomes_unfit_in_mid_training() -> None:
    param = make_param()
    optimizer = SGD_AGC([param], lr=0.1, clipping=0, backend="triton")
    optimizer.step()
    param.grad = with_sparse_grad().grad
    with nothing_changes([param], optimizer), pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "interpreted", lambda: False)
    param = make_param("cpu")
    with nothing_changes([param]), pytest.raises(RuntimeError, match="Triton needs a GPU"):
        AdamW_AGC([param], backend="triton").step()
    with nothing_changes([param]), pytest.raises(RuntimeError, match="Triton needs a GPU"):
        adaptive_clip_grad_([param], backend="triton")


@every_class
def test_a_fallback_is_explained_once(cls: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer = cls([on_gpu(), on_gpu()], lr=0.1)
            for _ in range(2):
                optimizer.step()
    (warning,) = caught
    for part in (
        *("parameter 0 of group 0", "a OnGpu is not a plain tensor", "which is slower"),
        *("explain()", "backend='torch'"),
    ):
        assert part in str(warning.message)


def test_clipping_alone_explains_its_fallback() -> None:
    param = on_gpu()
    with pytest.warns(UserWarning, match="takes the torch path.*a OnGpu is not a plain tensor"):
        adaptive_clip_grad_([param])
    with pytest.raises(RuntimeError, match=r"a OnGpu is not a plain tensor; .*'auto'"):
        adaptive_clip_grad_([param], backend="triton")


@pytest.mark.parametrize(
    "asked", [{"backend": "torch"}, {"foreach": True}, {"fused": False}, {"differentiable": True}]
)
def test_what_was_asked_for_needs_no_warning(asked: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SGD_AGC([on_gpu()], lr=0.1, **asked)
        optimizer.step()
    assert optimizer._paths.triton.plan is None


def test_empty_parameters_need_no_kernel() -> None:
    empty = torch.zeros(0, 4, device=DEVICE)
    empty.grad = torch.zeros(0, 4, device=DEVICE)
    optimizer = SGD_AGC([empty, make_param()], lr=0.1, momentum=0.9, backend="triton")
    optimizer.step()
    assert optimizer._paths.triton.plan is not None
    ((_, group),) = optimizer._paths.triton.plan.rest(optimizer.param_groups)
    assert group["params"][0] is empty
    alone = SGD_AGC([empty], lr=0.1, backend="triton")
    alone.step()
    assert alone._paths.triton.plan is None


def test_a_plan_that_does_not_fit_is_never_launched() -> None:
    cached: Cached[str] = Cached()
    with pytest.raises(AssertionError, match="please report"):
        cached.get(lambda plan: None, lambda: "a plan")
    assert cached.plan is None


def test_nothing_to_do() -> None:
    optimizer = AdamW_AGC([Parameter(weight((3, 20), device=DEVICE))], backend="triton")
    optimizer.step()
    assert not optimizer.state
    adaptive_clip_grad_([], backend="triton")
