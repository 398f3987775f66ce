"""Work for several tests, done once for all processes that run them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def once(work: Callable[[Path], Any], name: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of this name that the first process to come gives to ``work``."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            work(folder)
    return folder
