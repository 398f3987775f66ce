"""The site, which `make docs` builds: README.md, docs/ and the docstrings, by Sphinx.

Its root is the repository, so that links lead where they lead on GitHub.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import agc_triton  # noqa: E402  # from this tree, whatever is installed

project = "agc_triton"
author = copyright = "The agc_triton authors"
version = release = agc_triton.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "README"
exclude_patterns = [".*", "build", "dist"]
include_patterns = ["*.md", "docs/*.md", "benchmarks/results/README.md"]
include_patterns += ["benchmarks/results/*/fashion/comparison.md"]
nitpicky = True
# Other packages' pages are not fetched.
nitpick_ignore_regex = [("py:.*", r"(?!agc_triton).*"), ("std:ref", "accelerators")]
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"agc_triton {release}"

PAGES = """

```{toctree}
:hidden:
:maxdepth: 1

docs/api
docs/groups
docs/choosing-clipping
docs/backends
docs/distributed
docs/checkpoints
docs/integrations
docs/differences
docs/benchmarks
docs/comparison
benchmarks/results/README
benchmarks/results/intel-xeon-2-threads/fashion/comparison
docs/architecture
docs/coverage
docs/mutations
CONTRIBUTING
SECURITY
CHANGELOG
```
"""


def add_pages(_app: Any, page: str, source: list[str]) -> None:
    """Put the list of pages, which GitHub would not understand, at the README's end."""
    if page == root_doc:
        source[0] += PAGES


def name_front_page(app: Any, error: Exception | None) -> None:
    """Make the README what a server shows first."""
    if not error:
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def without_targets(*arguments: Any) -> None:
    """Leave out links of torch's docstrings whose targets are not among its arguments."""
    lines = arguments[-1]
    lines[:] = re.sub(r"`([^`]+)`_(?!_)", r"\1", "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    """Connect them."""
    app.connect("autodoc-process-docstring", without_targets)
    app.connect("source-read", add_pages)
    app.connect("build-finished", name_front_page)
