"""Options of AGC by position, which agc_optims took so."""

from __future__ import annotations

import warnings
from typing import Any

from agc_triton.optim.optimizer import AGC_EPS, CLIPPING


def by_name(positional: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Options given by position, by name.

    Raises:
        TypeError: there are more than three, or one is given by name as well.
    """
    usual = {"clipping": CLIPPING, "agc_eps": AGC_EPS, "unit_dim": None}
    if len(positional) > len(usual):
        raise TypeError(f"AGC takes an optimizer and options by name, not {positional}")
    named = dict(zip(usual, positional, strict=False))
    for key in named:
        if options[key] != usual[key]:
            raise TypeError(f"AGC got two values for {key}, one of them by position")
    instead = ", ".join(f"{key}={value!r}" for key, value in named.items())
    warnings.warn(
        f"AGC's options by position are deprecated; write AGC(optimizer, {instead})",
        DeprecationWarning,
        stacklevel=3,
    )
    return named
