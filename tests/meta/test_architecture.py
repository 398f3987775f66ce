"""docs/architecture.md, where lint-imports does not look: the cellar, and the picture."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted(ROOT.joinpath("kernels").glob("*.py"))


def imported(source: str) -> set[str]:
    """Every module that is imported anywhere in it, a package for names taken from one."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_kernels_import_nothing_from_above(file: Path) -> None:
    found = {name for name in imported(file.read_text()) if name.split(".")[0] != "triton"}
    assert {name for name in found if name.split(".")[:2] != ["agc_triton", "kernels"]} == set()


def test_the_layout_of_the_tables_imports_nothing() -> None:
    assert imported((ROOT / "kernels" / "abi.py").read_text()) == set()


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b, c\ndef f():\n  from ..d import e\n  from . import g, h\n  import i.j as k"
    assert imported(source) == {"a.b", "c", "..d", ".", "i.j"}


def test_the_picture_shows_what_the_code_imports() -> None:
    picture = runpy.run_path(str(ROOT / "docs" / "picture.py"))
    drawn: dict[str, set[str]] = {"node": set(), "edge": set()}
    for element in ElementTree.parse(ROOT / "docs" / "architecture.svg").iter():
        if element.get("class") in drawn:
            drawn[element.attrib["class"]].add(element.findtext("{*}title", ""))
    assert drawn["edge"] == {f"{a}->{b}" for a, b in picture["arrows"]()}, "make picture draws it"
    assert drawn["node"] == {"kernels"}.union(*picture["floors"]())
