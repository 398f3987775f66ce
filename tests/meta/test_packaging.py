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


def build(tree: Path, hook: str, out: Path) -> Path:
    """What setuptools makes of a tree, alone in a folder."""
    out.mkdir()
    call(tree, sys.executable, "-c", HOOK, hook, out)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def unlinked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("clone"), False)


@pytest.fixture(scope="module")
def wheel(unlinked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkout without symlinks."""
    return build(unlinked, "build_wheel", tmp_path_factory.mktemp("built") / "wheel")


def modules(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(("agc_triton/", "kernels/")))


def test_every_build_holds_each_module_once(tmp_path: Path, unlinked: Path, wheel: Path) -> None:
    linked = clone(tmp_path, True)
    files = [*(unlinked / "agc_triton").rglob("*.py"), unlinked / "agc_triton" / "py.typed"]
    expected = [file.relative_to(unlinked).as_posix() for file in files]
    expected += [f"agc_triton/kernels/{file.name}" for file in (unlinked / "kernels").glob("*.py")]
    assert "agc_triton/kernels/step.py" in expected

    sdist = build(linked, "build_sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = [m.name.partition("/")[2] for m in archive if m.isfile()]
    assert modules(names) == sorted(expected)

    pip(tmp_path, "wheel", sdist, "--no-build-isolation", "--wheel-dir", tmp_path / "again")
    (from_sdist,) = (tmp_path / "again").iterdir()
    wheels = [build(linked, "build_wheel", tmp_path / "wheel"), wheel, from_sdist]
    first, *others = [sorted(zipfile.ZipFile(file).namelist()) for file in wheels]
    assert modules(first) == sorted(expected)
    assert others == [first, first]


def steps(cwd: Path, installed: Path) -> None:
    """Both paths step, with what is installed there."""
    environment = {"PYTHONPATH": str(installed), "TRITON_INTERPRET": "1"}
    call(cwd, sys.executable, "-c", STEP, installed, **environment, CUDA_VISIBLE_DEVICES="")


def test_a_wheel_steps_where_the_checkout_had_no_symlinks(tmp_path: Path, wheel: Path) -> None:
    pip(tmp_path, "install", "--target", tmp_path / "installed", wheel)
    steps(tmp_path, tmp_path / "installed")


def test_an_editable_install_steps_where_the_checkout_had_no_symlinks(tmp_path: Path) -> None:
    built = build(clone(tmp_path, False), "build_editable", tmp_path / "built")
    with zipfile.ZipFile(built) as archive:
        # Installed, it is one path for sys.path.
        (pth,) = [name for name in archive.namelist() if name.endswith(".pth")]
        steps(tmp_path, Path(archive.read(pth).decode().strip()))
