"""Packages are used where they are installed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from benchmarks.lib.peers import adaptive_clip_grad, timm_adaptive_clip_grad


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
