"""Packages are used where they are installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from benchmarks.lib.patience import Patience
from benchmarks.lib.peers import adaptive_clip_grad, timm_adaptive_clip_grad
from benchmarks.lib.providers import providers


def test_installed_timm_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, utils, agc = (ModuleType(name) for name in ("timm", "timm.utils", "timm.utils.agc"))
    timm.__version__ = "9.9"  # type: ignore[attr-defined]  # a stand-in module
    agc.adaptive_clip_grad = print  # type: ignore[attr-defined]  # a stand-in module
    for module in (timm, utils, agc):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert timm_adaptive_clip_grad() == (print, "timm 9.9")

    monkeypatch.setitem(sys.modules, "timm.utils.agc", None)
    assert timm_adaptive_clip_grad()[0] is adaptive_clip_grad


def test_a_package_that_fails_on_import_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.warns(UserWarning, match=r"timm.utils.agc is installed but left out: operator"):
        assert timm_adaptive_clip_grad()[0] is adaptive_clip_grad


def test_installed_packages_are_used_and_those_that_compile_have_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_ins = {"pytorch_optimizer.optimizer.agc", "heavyball.utils"}
    for name in (*stand_ins, "timm.utils.agc"):
        module = ModuleType(name) if name in stand_ins else None
        monkeypatch.setitem(sys.modules, name, module)
        if module:
            monkeypatch.setitem(sys.modules, name.partition(".")[0], module)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    patience = Patience(180)
    found = {
        len(compiled): {p.implementation: (p.version, p.patience) for p in known}
        for compiled in ((), ("timm",))
        for known in [providers("adamw", "cuda", compiled=compiled, patience=patience)]
    }
    of_one = "pytorch_optimizer agc, torch.optim fused"
    assert found[0][of_one] == found[1][of_one] == ("pytorch-optimizer 9.9", None)
    compiling = "heavyball AGC per tensor, torch.optim fused"
    assert compiling not in found[0]
    assert found[1][compiling] == ("heavyball 9.9", patience)
