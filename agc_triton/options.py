"""The options that AGC adds to parameter groups, and near misses of their names."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping
from typing import Any, TypedDict

from agc_triton.units import UnitDim

AGC_OPTIONS = ("clipping", "agc_eps", "unit_dim")

# What holds for all groups of an optimizer.
OF_OPTIMIZERS = ("backend", "nonfinite")


class AGCArguments(TypedDict, total=False):
    """What AGC optimizers take beside torch's arguments; `AGCOptimizer` has the defaults."""

    clipping: float | None
    agc_eps: float
    unit_dim: UnitDim
    backend: str
    nonfinite: str
    track_clipping: int


# Above what "eps", "clip" or "gradient_clipping" reach, under "agc_epsilon".
_NEAR = 0.75


def check_spelling(keys: Iterable[object], where: str, known: Container[object] = ()) -> None:
    """Check that no key of a group is nearly an AGC option; ``where`` ends the message.

    Keys that are like none, or ``known`` to the optimizer, are the user's affair.

    Raises:
        ValueError: a misspelt option, which would have no effect.
    """
    for key in keys:
        if key in AGC_OPTIONS or key in known or not isinstance(key, str):
            continue
        plain = key.lower().replace("-", "_")
        if near := difflib.get_close_matches(plain, AGC_OPTIONS, n=1, cutoff=_NEAR):
            raise ValueError(f"unknown option {key!r}{where}; did you mean {near[0]!r}?")


def check_level(
    group: Mapping[str, Any], where: str, own: Mapping[str, Any], known: Container[object] = ()
) -> None:
    """Check that a group sets nothing that is the whole optimizer's; ``where`` ends the message.

    It may say what the optimizer says, ``own``, as torch's ZeroRedundancyOptimizer writes all
    arguments into groups; and what is ``known`` to an optimizer that AGC is around is that one's.

    Raises:
        ValueError: it does.
    """
    for key in OF_OPTIMIZERS:
        if key in group and key not in known and group[key] != own.get(key):
            raise ValueError(
                f"{key!r} cannot be set{where}: it holds for all groups; pass it to the optimizer,"
                f" or set optimizer.{key}"
            )


def check_levels(
    groups: Iterable[Mapping[str, Any]], own: Mapping[str, Any], known: Container[object] = ()
) -> None:
    """The same for all groups of an optimizer, as they are or as a checkpoint has them."""
    for index, group in enumerate(groups):
        check_level(group, f" in parameter group {index}", own, known)
