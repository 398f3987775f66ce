"""An AGC class in place of a torch.optim class."""

from __future__ import annotations

from typing import Any

from tests.support.optimizers import NAMES, PAIRS, STATEFUL, TORCHS

STATE: dict[Any, dict[str, Any]] = {
    TORCHS[name]: {**STATEFUL[name], "lr": 0.1, "maximize": False} for name in NAMES
}


def ours(cls: Any, params: Any, backend: str, **options: Any) -> Any:
    return PAIRS[cls](params, **STATE[cls], backend=backend, **options)
