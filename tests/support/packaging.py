"""Building and installing the package, and running what is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.markdown import ROOT

HOOK = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"

# Both paths step, by what is installed in a folder.
STEP = """
import sys
from pathlib import Path
import agc_triton, torch

assert Path(agc_triton.__file__).is_relative_to(sys.argv[1]), agc_triton.__file__

def stepped(backend):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, 7))
    parameter.grad = torch.randn(5, 7)
    before = parameter.detach().clone()
    optimizer = agc_triton.SGD_AGC([parameter], lr=0.5, clipping=0.1, backend=backend)
    optimizer.step()
    assert optimizer.explain()["backend"][0] == backend
    assert not torch.equal(parameter, before)
    return parameter.detach()

torch.testing.assert_close(stepped("triton"), stepped("torch"))
from agc_triton.kernels import step
assert Path(step.__file__).is_relative_to(sys.argv[1]), step.__file__
"""


def call(cwd: Path, *command: str | Path, stdin: str | None = None, **environment: str) -> str:
    """Run a command; what it wrote is shown where it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clone(folder: Path, symlinks: bool) -> Path:
    """A clone with what has changed in the working tree's tracked files since its commit."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("there is no git, or no repository to clone")
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("git does not read this repository")
    tree = folder / ("linked" if symlinks else "unlinked")
    setting = f"core.symlinks={str(symlinks).lower()}"
    call(folder, "git", "clone", "--quiet", "--config", setting, ROOT, tree)
    if changes := call(ROOT, "git", "diff", "--binary", "--no-ext-diff", "--no-color", "HEAD"):
        call(tree, "git", "apply", "-", stdin=changes)
    assert (tree / "agc_triton" / "kernels").is_symlink() is symlinks
    return tree


def pip(cwd: Path, *arguments: str | Path) -> None:
    offline = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    call(cwd, sys.executable, "-m", "pip", *arguments, *offline)


def build(tree: Path, hook: str, out: Path) -> Path:
    """What setuptools makes of a tree, alone in a folder."""
    out.mkdir()
    call(tree, sys.executable, "-c", HOOK, hook, out)
    (built,) = out.iterdir()
    return built
