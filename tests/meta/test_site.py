"""The site: every public name is in it, and a link that leads nowhere is an error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import agc_triton
from agc_triton.optim.optimizer import AGCOptimizer
from tests.support.markdown import PAGES, ROOT
from tests.support.once import once


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does."""
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-d", str(out / "trees")]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "-c", ROOT / "docs", source, out / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def work(out: Path) -> None:
        done = build(ROOT, out)
        assert done.returncode == 0, done.stderr

    return once(work, __name__, tmp_path_factory) / "site"


def documented(site: Path) -> set[str]:
    """The names that the API reference can be linked to."""
    return set(re.findall(r'id="(agc_triton\.[\w.]+)"', (site / "docs" / "api.html").read_text()))


def test_every_page_is_there_and_the_readme_comes_first(site: Path) -> None:
    pages = [site / page.relative_to(ROOT).with_suffix(".html") for page in PAGES]
    assert [page for page in pages if not page.is_file()] == []
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    assert {f"agc_triton.{name}" for name in agc_triton.__all__} <= documented(site)


def test_what_optimizers_have_in_common_is_in_the_reference(site: Path) -> None:
    where = f"{AGCOptimizer.__module__}.AGCOptimizer."
    public = {name for name in vars(AGCOptimizer) if not name.startswith("_")} - {"rule"}
    assert {"step", "explain", "skipped_units", "backend"} <= public
    assert {where + name for name in public} <= documented(site)


def test_broken_links_are_errors(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Title\n\n[a](docs/b.md) [c](#d) ![e](f.png)\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    for complaint in ("'docs/b.md'", "'d'", "not readable: f.png"):
        assert complaint in done.stderr
