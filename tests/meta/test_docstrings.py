"""Docstrings of public names say what the API reference promises."""

from __future__ import annotations

import builtins
import inspect
import re
from typing import Any

import pytest

import agc_triton
from agc_triton.optim.optimizer import AGCOptimizer

PUBLIC = [getattr(agc_triton, name) for name in agc_triton.__all__]
METHODS = [
    (cls, name)
    for cls in (AGCOptimizer, agc_triton.AGC)
    for name, member in vars(cls).items()
    if not name.startswith("_") and (callable(member) or isinstance(member, property))
]


def section(doc: str, heading: str) -> dict[str, str]:
    """What a section says, by its entries' names; those that share an entry share its text."""
    found = re.search(rf"^{heading}:\n((?: {{4}}.*(?:\n|\Z))+)", doc, re.MULTILINE)
    entry = r"^ {4}(\w[\w, ]*?)(?: \([^:]*\))? ?:(.*(?:\n {5}.*)*)"
    entries = re.findall(entry, found[1] if found else "", re.MULTILINE)
    return {name: text.strip() for names, text in entries for name in names.split(", ")}


def documentation(member: Any) -> str:
    doc = inspect.getdoc(member)
    assert doc is not None
    return doc


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_public_names_say_shapes_dtypes_units_and_source(public: Any) -> None:
    doc = documentation(public)
    for word in ("shape", "dtype", "unit", "Brock et al. 2021", "2102.06171"):
        assert word in doc, word


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_public_names_describe_every_argument(public: Any) -> None:
    positional = inspect.Parameter.VAR_POSITIONAL  # deprecated where there is one
    taken = inspect.signature(public).parameters
    named = {name for name, parameter in taken.items() if parameter.kind is not positional}
    assert named == set(section(documentation(public), "Args"))


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_public_names_say_which_errors_there_are_and_why(public: Any) -> None:
    raised = section(documentation(public), "Raises")
    assert raised
    for name, reason in raised.items():
        assert issubclass(getattr(builtins, name), Exception)
        assert len(reason.split()) > 2


@pytest.mark.parametrize(
    ("cls", "name"), METHODS, ids=[f"{cls.__name__}.{name}" for cls, name in METHODS]
)
def test_methods_say_what_they_do(cls: Any, name: str) -> None:
    assert documentation(vars(cls)[name])


def test_sections_are_read_entry_by_entry() -> None:
    doc = "Does.\n\nArgs:\n    a, b: two\n        lines\n    c (int, optional):\n        one\n\n"
    two = "two\n        lines"
    assert section(doc, "Args") == {"a": two, "b": two, "c": "one"}
    assert section(f"{doc}Raises:\n    E: x", "Raises") == {"E": "x"}
    assert section(doc, "Returns") == {}
