"""What is read out of the README and docs/: examples and links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What the site is made of, beside the docstrings.
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks" / "results" / "README.md",
    ]
)


def examples(text: str) -> list[str]:
    """The Python examples of a page or a section of it, in their order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_examples(text: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a text's examples one after the other, on names to which theirs are added."""
    for block in examples(text):
        exec(block, names)
    return names


def links(text: str) -> list[str]:
    """Where links and pictures of a text lead, code left out."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", prose)
