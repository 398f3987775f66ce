"""Options of a whole optimizer, checked whenever they are set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class CheckedOption:
    """An attribute that ``check(optimizer, value)`` may refuse; pickles hold it under its name.

    An object pickled before there was such an option has the default.
    """

    def __init__(self, check: Callable[[Any, str], None], default: str) -> None:
        self._check, self._default = check, default

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the attribute's name."""
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> str:
        value: str = self._default
        return value if optimizer is None else vars(optimizer).get(self._name, value)

    def __set__(self, optimizer: Any, value: str) -> None:
        self._check(optimizer, value)
        vars(optimizer)[self._name] = value
