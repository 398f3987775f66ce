"""Cross products, of which ``make test`` runs a part and ``make soak`` the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def soaked(cases: Iterable[Any], quick: Callable[..., bool]) -> list[Any]:
    """Values of one parameter, or tuples of several: those not ``quick`` have the marker soak."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if quick(*values) else pytest.mark.soak
        found.append(pytest.param(*values, marks=marks))
    return found


# For what does not depend on the kind of blocks.
packed_blocks = pytest.mark.parametrize(
    "either_block", soaked(("packed", "alone"), lambda kind: kind == "packed"), indirect=True
)
