"""ClipMonitor in loops, and the callbacks' door where their packages are missing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.optim import SGD

from agc_triton import AGC, SGD_AGC
from agc_triton.integrations import ClipMonitor
from agc_triton.integrations.monitor import clipping_optimizer
from tests.support.bases import Lookahead
from tests.support.places import DEVICE
from tests.support.tensors import SHAPES, parameters, set_grads

KEYS = {"agc/clipped", "agc/ratio_50", "agc/ratio_95", "agc/ratio_max", "agc/removed"}


def weights() -> list[torch.nn.Parameter]:
    return parameters(SHAPES, device=DEVICE)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda params: SGD_AGC(params, lr=0.1, clipping=0.1), id="SGD_AGC"),
        pytest.param(lambda params: AGC(SGD(params, lr=0.1), clipping=0.1), id="AGC"),
    ],
)
def test_every_nth_step_is_logged_as_the_optimizer_tells_it(make: Any) -> None:
    params = weights()
    optimizer = make(params)
    logged: list[dict[str, float]] = []
    monitor = ClipMonitor(optimizer, logged.append, every=3)
    expected = []
    for step in range(7):
        set_grads(params, step)
        optimizer.step()
        if step % 3 == 0:
            assert optimizer.clip_stats()["step"].iloc[-1] == step + 1
            expected.append({f"agc/{key}": value for key, value in optimizer.clip_log().items()})
    assert logged == expected
    assert len(logged) == 3
    assert set(logged[0]) == KEYS
    assert logged[0] != logged[1]
    monitor.close()
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    assert len(logged) == 3
    assert optimizer.clip_stats()["step"].iloc[-1] == 7


def test_steps_that_record_nothing_are_not_logged() -> None:
    params = weights()
    optimizer = SGD_AGC(params, lr=0.1, clipping=0.1)
    logged: list[dict[str, float]] = []
    ClipMonitor(optimizer, logged.append)
    optimizer.step()  # no gradient
    assert logged == []
    set_grads(params, 0)
    optimizer.step()
    assert len(logged) == 1


def test_the_optimizer_is_found_inside_another() -> None:
    optimizer = SGD_AGC(weights(), lr=0.1)
    assert clipping_optimizer(Lookahead(optimizer)) is optimizer
    wrapper = AGC(SGD(weights(), lr=0.1))
    assert clipping_optimizer(wrapper) is wrapper
    assert clipping_optimizer(SGD(weights(), lr=0.1)) is None


def test_an_optimizer_that_does_not_clip_is_named() -> None:
    with pytest.raises(TypeError, match=r"optimizers \(SGD\) do not clip.*agc_triton\.AGC"):
        ClipMonitor(SGD(weights(), lr=0.1), print)


def test_a_base_without_step_hooks_is_named() -> None:
    class Bare(Lookahead):  # torch may have hooked the other's step in another test
        def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
            return super().step(closure)

    optimizer = AGC(Bare(SGD(weights(), lr=0.1)))
    with pytest.raises(TypeError, match="Bare calls no step hooks"):
        ClipMonitor(optimizer, print)


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_a_number_of_steps(every: int) -> None:
    with pytest.raises(ValueError, match=f"every must be 1 step or more, not {every}"):
        ClipMonitor(SGD_AGC(weights(), lr=0.1), print, every)


def test_importing_it_imports_no_framework() -> None:
    code = "import sys, agc_triton.integrations; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "agc_triton.integrations.monitor" in loaded
    assert not {"lightning", "pytorch_lightning", "transformers", "accelerate"} & set(loaded)


@pytest.mark.parametrize(
    ("name", "package"),
    [("LightningClipMonitor", "lightning"), ("TransformersClipCallback", "transformers")],
)
def test_a_missing_framework_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import agc_triton.integrations

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{name} is a callback.*pip install {package}"):
        getattr(agc_triton.integrations, name)
    with pytest.raises(AttributeError, match="no attribute 'WandbClipMonitor'"):
        agc_triton.integrations.WandbClipMonitor  # noqa: B018
