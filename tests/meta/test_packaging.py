"""What is built from a clone holds the kernels, with symlinks and, as on Windows, without."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

from tests.support.packaging import STEP, build, call, clone, pip


def modules(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(("agc_triton/", "kernels/")))


def contents(wheel: Path) -> dict[str, int]:
    """Names and checksums of a wheel's files."""
    return {file.filename: file.CRC for file in zipfile.ZipFile(wheel).infolist()}


def test_every_build_holds_each_module_once_and_an_sdist_all_that_is_not_hidden(
    tmp_path: Path,
) -> None:
    linked, unlinked = clone(tmp_path, True), clone(tmp_path, False)
    files = [*(unlinked / "agc_triton").rglob("*.py"), unlinked / "agc_triton" / "py.typed"]
    expected = [file.relative_to(unlinked).as_posix() for file in files]
    expected += [f"agc_triton/kernels/{file.name}" for file in (unlinked / "kernels").glob("*.py")]
    assert "agc_triton/kernels/step.py" in expected

    sdist = build(linked, "build_sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m.isfile() for m in archive}
    names = [name for name, is_file in members.items() if is_file]
    assert modules(names) == sorted(expected)
    tracked = set(call(linked, "git", "ls-files").splitlines())
    missing = {name for name in tracked - members.keys() if not name.startswith((".", "kernels/"))}
    assert missing == set()

    pip(tmp_path, "wheel", sdist, "--no-build-isolation", "--wheel-dir", tmp_path / "again")
    (from_sdist,) = (tmp_path / "again").iterdir()
    first = contents(build(linked, "build_wheel", tmp_path / "wheel"))
    assert modules([*first]) == sorted(expected)
    assert contents(build(unlinked, "build_wheel", tmp_path / "unlinked-wheel")) == first
    assert contents(from_sdist) == first


def test_an_editable_install_steps_where_the_checkout_had_no_symlinks(tmp_path: Path) -> None:
    built = build(clone(tmp_path, False), "build_editable", tmp_path / "built")
    with zipfile.ZipFile(built) as archive:
        # Installed, it is one path for sys.path.
        (pth,) = [name for name in archive.namelist() if name.endswith(".pth")]
        installed = archive.read(pth).decode().strip()
    environment = {"PYTHONPATH": installed, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    call(tmp_path, sys.executable, "-c", STEP, installed, **environment)
