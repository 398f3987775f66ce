"""What is built from a clone holds the kernels, with symlinks and, as on Windows, without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HOOK = "import sys, setuptools.build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"

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


def wheel(source: Path, out: Path) -> Path:
    pip(out.parent, "wheel", source, "--no-build-isolation", "--wheel-dir", out)
    (built,) = out.glob("*.whl")
    return built


def modules(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(("agc_triton/", "kernels/")))


def test_every_build_holds_each_module_once(tmp_path: Path) -> None:
    linked, unlinked = clone(tmp_path, True), clone(tmp_path, False)
    files = [*(unlinked / "agc_triton").rglob("*.py"), unlinked / "agc_triton" / "py.typed"]
    expected = [file.relative_to(unlinked).as_posix() for file in files]
    expected += [f"agc_triton/kernels/{file.name}" for file in (unlinked / "kernels").glob("*.py")]
    assert "agc_triton/kernels/step.py" in expected

    call(linked, sys.executable, "-c", HOOK, "build_sdist", tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [m.name.partition("/")[2] for m in archive if m.isfile()]
    assert modules(names) == sorted(expected)

    built = [wheel(tree, tmp_path / f"from-{tree.name}") for tree in (linked, unlinked, sdist)]
    first, *others = [sorted(zipfile.ZipFile(file).namelist()) for file in built]
    assert modules(first) == sorted(expected)
    assert others == [first, first]


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_steps_where_the_checkout_had_no_symlinks(tmp_path: Path, editable: bool) -> None:
    tree, target = clone(tmp_path, False), tmp_path / "installed"
    if editable:  # installed, it is one path for sys.path
        call(tree, sys.executable, "-c", HOOK, "build_editable", tmp_path)
        (built,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            (pth,) = [name for name in archive.namelist() if name.endswith(".pth")]
            target = Path(archive.read(pth).decode().strip())
    else:
        pip(tmp_path, "install", "--target", target, wheel(tree, tmp_path / "wheels"))
    environment = {"PYTHONPATH": str(target), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    call(tmp_path, sys.executable, "-c", STEP, target, **environment)
