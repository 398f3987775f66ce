"""An AGC class in place of a torch.optim class."""

from __future__ import annotations

from typing import Any

from torch.optim import SGD, Adam, AdamW, RMSprop

from tests.support.optimizers import PAIRS

STATE: dict[Any, dict[str, Any]] = {
    SGD: {"lr": 0.1, "momentum": 0.9},
    Adam: {"lr": 0.1, "amsgrad": True},
    AdamW: {"lr": 0.1, "weight_decay": 0.1},
    RMSprop: {"lr": 0.1, "momentum": 0.9, "centered": True},
}


def ours(cls: Any, params: Any, backend: str, **options: Any) -> Any:
    return PAIRS[cls](params, **STATE[cls], backend=backend, **options)
