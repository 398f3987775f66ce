"""Versions tell commits apart."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import agc_triton
from benchmarks.lib.versions import version_in


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_our_version_tells_commits_apart(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "agc_triton"
    (tmp_path / "kernels").mkdir()
    package.mkdir()
    (package / "kernels").symlink_to("../kernels")
    (package / "__init__.py").touch()
    assert version_in(package) == agc_triton.__version__
    git("init")
    assert version_in(package) == agc_triton.__version__
    git("add", ".")
    git("commit", "-m", "first")
    clean = f"{agc_triton.__version__}+g{git('rev-parse', 'HEAD')[:7]}"
    assert version_in(package) == clean
    (tmp_path / "results.csv").touch()
    assert version_in(package) == clean
    (tmp_path / "kernels" / "step.py").touch()
    assert version_in(package) == f"{clean}.dirty"
