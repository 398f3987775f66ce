"""Draws docs/architecture.svg from the imports in the code: ``make picture`` (needs graphviz)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grimp

FLOORS = (
    ("optim", "model"),
    ("clipping", "explain"),
    ("dispatch",),
    ("torch_path", "triton_path"),
    ("routing",),
    ("norms",),
    ("nonfinite",),
    ("validation",),
    ("rule", "snapshot", "units", "versions"),
)


def main() -> None:
    """One box per room, a row per floor, an arrow where any file of a room imports another's."""
    graph = grimp.build_graph("agc_triton")
    arrows = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            rooms = [module.split(".")[1:2] for module in (importer, imported)]
            if all(rooms) and rooms[0] != rooms[1]:
                arrows.add(tuple(room[0] for room in rooms))
    rows = [f"{{rank=same; {'; '.join(floor)}}}" for floor in FLOORS]
    lines = [f"{a} -> {b};" for a, b in sorted(arrows)]
    style = (
        'bgcolor=white; node [shape=box, fontname="Helvetica", style=filled, fillcolor="#eef3fa"]'
    )
    dot = "\n".join(["digraph {", style, *rows, *lines, "triton_path -> kernels;", "}"])
    target = Path(__file__).with_name("architecture.svg")
    subprocess.run(["dot", "-Tsvg", "-o", target], input=dot, text=True, check=True)


if __name__ == "__main__":
    main()
