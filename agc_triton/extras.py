"""Packages that are imported where somebody asks for what they make: they take long to import."""

from __future__ import annotations

import importlib
from typing import Any


def needed(package: str, what: str) -> Any:
    """A package; ``what`` says what it is needed for, as a message begins.

    Raises:
        ImportError: it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(
            f"{what}, and {name} cannot be imported ({error}); install it with: pip install {name}"
        ) from error
