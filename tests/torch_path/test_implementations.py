"""Which of torch's implementations blocks are updated by, where it has no fused kernel."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from agc_triton.optim import OPTIMIZERS
from tests.support.optimizers import CLIPPING, NAMES, TORCHS, takes

UNFUSED = [name for name in NAMES if not takes(name, "fused") and name != "RMSprop"]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", UNFUSED)
def test_foreach_where_it_is_the_faster_one_unless_told_otherwise(
    name: str, foreach: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, called = sys.modules[TORCHS[name].__module__], set[str]()
    for kind in ("single", "multi"):
        monkeypatch.setattr(
            module,
            f"_{kind}_tensor_{name.lower()}",
            lambda *args, kind=kind, **kwargs: called.add(kind),
        )
    weight = nn.Parameter(torch.ones(4, 3, device="cpu"))
    weight.grad = torch.ones_like(weight)
    OPTIMIZERS[name]([weight], clipping=CLIPPING, foreach=foreach).step()
    faster = name in ("Adadelta", "Adamax", "NAdam", "RAdam", "Rprop")
    assert called == {"multi" if faster and foreach is None else "single"}
