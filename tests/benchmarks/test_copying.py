"""The copy moves as many bytes as a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.copying import copy_provider
from benchmarks.lib.optimizers import minimal_bytes


@pytest.mark.parametrize("least", [0, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elements", [1, 17, 256])
def test_the_copy_moves_as_many_bytes_in_buffers_that_are_not_larger(
    elements: int, dtype: torch.dtype, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.lib.copying.LEAST_COPIED", least)
    params = [torch.zeros(elements, dtype=dtype)]
    step = copy_provider("adamw").build(params)
    with Copied() as copied:
        step()
    moved = minimal_bytes("adamw", params)
    assert 2 * sum(to.nbytes for to, _ in copied.pairs) == moved
    assert all(to.nbytes % 8 == 0 for to, _ in copied.pairs[:-1])
    storages = [x.untyped_storage() for pair in copied.pairs for x in pair]
    buffers = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(buffers.values()) <= max(moved / 4, min(moved, least)) + 16


class Copied(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Collects what is copied to, and from what."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is untyped
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert "copy_" in str(func)
        self.pairs.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))
