"""Settings for all tests."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from agc_triton.torch_path import blocks
from agc_triton.triton_path.tables import Tables

# Read when agc_triton.kernels is imported: without a GPU its kernels run on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# torch's fused kernels wake all threads for tensors of any size, which takes longer than the work.
torch.set_num_threads(1)

# The same examples in each run, so that a failure can be repeated; no deadline, as machines stall.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("repeatable")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each upload of tables to the device from now on, whether it was captured."""
    found: list[bool] = []
    upload = Tables.upload

    def counted(self: Tables, capturing: bool) -> None:
        found.append(capturing)
        upload(self, capturing)

    monkeypatch.setattr(Tables, "upload", counted)
    return found


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty and torch.empty_like holds NaN, or a wild integer."""

    def poison(allocate: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(-1 if not tensor.dtype.to_real().is_floating_point else torch.nan)

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(params=["joined", "alone"])
def either_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path's two kinds of blocks: small tensors are joined, or each has its own."""
    if request.param == "alone":
        monkeypatch.setattr(blocks, "PACKED", 0)
