"""Draws docs/architecture.svg from the imports in the code: ``make picture`` (needs graphviz)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import grimp
from importlinter import api

ROOT = Path(__file__).parents[1]
KERNELS = re.compile(r"^ *(from|import) agc_triton\.kernels\b", re.MULTILINE)


def floors() -> list[list[str]]:
    """The rooms of each floor, top first: the layers that lint-imports holds."""
    contracts = api.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    (layers,) = [c["layers"] for c in contracts if c.get("containers") == ["agc_triton"]]
    return [layer.split(" | ") for layer in layers]


def arrows() -> set[tuple[str, str]]:
    """Two rooms for each of which any file imports one of the other's."""
    graph = grimp.build_graph("agc_triton", cache_dir=None)
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            rooms = [module.split(".")[1:2] for module in (importer, imported)]
            if all(rooms) and rooms[0] != rooms[1]:
                found.add((rooms[0][0], rooms[1][0]))
    # No regular package, kernels/ is not in the graph.
    package = ROOT / "agc_triton"
    for file in package.rglob("*.py"):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        if room != "kernels" and KERNELS.search(file.read_text()):
            found.add((room, "kernels"))
    return found


def main() -> None:
    """One box per room, a row per floor, an arrow where any file of a room imports another's."""
    rows = [f"{{rank=same; {'; '.join(floor)}}}" for floor in floors()]
    lines = [f"{a} -> {b};" for a, b in sorted(arrows())]
    style = (
        'bgcolor=white; node [shape=box, fontname="Helvetica", style=filled, fillcolor="#eef3fa"]'
    )
    dot = "\n".join(["digraph {", style, *rows, *lines, "}"])
    target = Path(__file__).with_name("architecture.svg")
    subprocess.run(["dot", "-Tsvg", "-o", target], input=dot, text=True, check=True)


if __name__ == "__main__":
    main()
