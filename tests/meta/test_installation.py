"""The wheel and the sdist, installed where there is nothing else of the repository.

The environment is new and holds nothing but the package. What that needs (torch, Triton, pandas) is
not installed again, as it is gigabytes: a .pth file leads to the packages of the Python that runs
the tests, behind the environment's own. An editable install there is not followed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import agc_triton
from tests.support.markdown import ROOT, examples
from tests.support.packaging import STEP, build, call, clone, pip
from tests.support.soak import soaked

NAME = f"agc_triton-{agc_triton.__version__}"
BORROWED = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
HOOKS = ("build_wheel", "build_sdist")
VERSION = f"""
from importlib.metadata import version
assert version("agc_triton") == agc_triton.__version__ == {agc_triton.__version__!r}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("clone"), True)


def environment(folder: Path) -> tuple[Path, Path]:
    """The Python of a new environment, and where its packages go."""
    call(folder, sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return python, Path(call(folder, python, "-c", query).strip())


# That an sdist leads to the same wheel is in test_packaging.
@pytest.mark.parametrize("hook", soaked(HOOKS, lambda hook: hook == "build_wheel"))
def test_the_readmes_first_example_and_a_kernel_run(tmp_path: Path, tree: Path, hook: str) -> None:
    built = build(tree, hook, tmp_path / "built")
    python, packages = environment(tmp_path)
    if hook == "build_sdist":  # as pip does by itself, where setuptools is at hand
        assert built.name == f"{NAME}.tar.gz"
        pip(tmp_path, "wheel", built, "--no-build-isolation", "--wheel-dir", tmp_path / "wheel")
        (built,) = tmp_path.joinpath("wheel").iterdir()
    assert built.name == f"{NAME}-py3-none-any.whl"
    pip(tmp_path, "--python", python, "install", built)
    assert sorted(p.name for p in packages.iterdir()) == ["agc_triton", f"{NAME}.dist-info"]

    packages.joinpath("borrowed.pth").write_text("\n".join(BORROWED))
    first, *_ = examples((ROOT / "README.md").read_text())
    script = tmp_path / "script.py"
    script.write_text(first + STEP + VERSION)
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    shown = call(tmp_path, python, "-I", script, packages, **settings)
    assert "it is on cpu, and Triton needs a GPU" in shown
