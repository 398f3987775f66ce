"""An AGC class in place of a torch.optim class."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.optimizers import EACH_WAY, NAMES, PAIRS, STATEFUL, TORCHS
from tests.support.soak import soaked

STATE: dict[Any, dict[str, Any]] = {
    TORCHS[name]: {**STATEFUL[name], "lr": 0.1, "maximize": False} for name in NAMES
}


def ours(cls: Any, params: Any, backend: str, **options: Any) -> Any:
    return PAIRS[cls](params, **STATE[cls], backend=backend, **options)


# The interpreter is slow: what depends on no rule it shows with one for each way.
every_class_on_both_paths = pytest.mark.parametrize(
    ("cls", "backend"),
    soaked(
        itertools.product(PAIRS, ("torch", "triton")),
        lambda cls, backend: backend == "torch" or cls.__name__ in EACH_WAY,
    ),
)
