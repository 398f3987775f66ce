"""What names parameters of a model: patterns, modules, module types and callables."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from agc_triton.model.entries import Entry

Selector = str | nn.Module | type[nn.Module] | Callable[[str, Tensor], bool]


def select(
    entries: Sequence[Entry], selectors: Selector | Iterable[Selector] | None, argument: str
) -> set[int]:
    """Ids of the parameters that one or several selectors name.

    Raises:
        TypeError: what is no selector.
        ValueError: a pattern, module or type that matches nothing. Messages name the argument.
    """
    selected: set[int] = set()
    for selector in _as_list(selectors):
        if not (isinstance(selector, str) or callable(selector)):
            raise TypeError(
                f"{argument} takes patterns, modules, module types and callables (name, parameter)"
                f" -> bool, not {selector!r:.60}"
            )
        found = {id(entry.param) for entry in entries if _matches(entry, selector)}
        if not found and isinstance(selector, (str, type, nn.Module)):
            raise ValueError(_no_match(entries, selector, argument))
        selected |= found
    return selected


def within(entries: Iterable[Entry], modules: Sequence[nn.Module]) -> set[int]:
    """Ids of the parameters in any of these modules."""
    return {id(e.param) for e in entries if any(a is m for a in e.around for m in modules)}


def _as_list(selectors: Any) -> list[Any]:
    if selectors is None:
        return []
    one = isinstance(selectors, str) or callable(selectors) or not isinstance(selectors, Iterable)
    return [selectors] if one else list(selectors)


def _matches(entry: Entry, selector: Selector) -> bool:
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(path, selector) for path in entry.paths)
    if isinstance(selector, type):
        return any(isinstance(module, selector) for module in entry.around)
    if isinstance(selector, nn.Module):  # to be called is what it is for
        return any(module is selector for module in entry.around)
    return any(selector(name, entry.param) for name in entry.names)


def _no_match(entries: Sequence[Entry], selector: str | type | nn.Module, argument: str) -> str:
    if isinstance(selector, nn.Module):
        return (
            f"{argument} has a {type(selector).__name__} that is no module of this model with"
            " trainable parameters; name it by a pattern if the model is a copy"
        )
    if isinstance(selector, type):
        types = sorted({type(m).__name__ for entry in entries for m in entry.around})
        return (
            f"{argument}={selector.__name__} matches no module with trainable parameters;"
            f" there are: {', '.join(types)}"
        )
    paths = list(dict.fromkeys(path for entry in entries for path in entry.paths))
    near = difflib.get_close_matches(selector, paths, n=5, cutoff=0.0)
    return (
        f"{argument}={selector!r} matches no trainable parameter or module with one; near names:"
        f" {', '.join(near)}"
    )
