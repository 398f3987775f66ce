"""Which versions are measured."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from pathlib import Path

import agc_triton


@functools.cache
def our_version() -> str:
    """The version of what this process imported."""
    return version_in(Path(agc_triton.__file__).parent)


def version_in(package: Path) -> str:
    """The version; where git keeps the package also its commit, and whether code has changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    version = agc_triton.__version__
    try:
        # A package that is installed inside of a checkout is not what was checked out.
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "--short=7", "HEAD")
        changed = git("status", "--porcelain", "--", ".", str((package / "kernels").resolve()))
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}+g{commit}{'.dirty' if changed else ''}"


def triton_version() -> str:
    """The installed Triton's version, without importing it; empty where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
