"""Whether the tests see small faults: each of faults.csv is planted alone in a copy of the tree.

``python -m tests.meta.mutations`` runs the tests named beside each fault and writes
docs/mutations.md, unless only some are planted; it fails where a fault survives. The working tree
itself is only read.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.lib.versions import our_version

ROOT = Path(__file__).parents[2]
FAULTS = ROOT / "tests" / "meta" / "faults.csv"
REPORT = ROOT / "docs" / "mutations.md"
TIMEOUT = 900  # seconds; only tests that hang take as long

HEADER = """\
# Planted faults

`make mutations` (or `python -m tests.meta.mutations`) plants each fault below alone in a copy of
the tree, runs the tests named beside it in `tests/meta/faults.csv`, and writes this table. Those
tests pass without a fault. At {version} all {count} faults were found; the last column is the first
test that failed. The kernels run in Triton's interpreter where there is no GPU: faults that only a
GPU could show (alignment promises, races, graph replays) are not among them.

"""


class Fault(NamedTuple):
    """``old`` occurs exactly once in ``file`` and gives way to ``new``: one of ``tests`` must fail.

    ``tests`` are pytest's arguments, separated by spaces.
    """

    file: str
    what: str
    old: str
    new: str
    tests: str


def read_faults() -> list[Fault]:
    """The faults in the table's order."""
    return [Fault(*row) for row in pd.read_csv(FAULTS, keep_default_na=False).to_numpy().tolist()]


@contextmanager
def copy_of_tree() -> Iterator[Path]:
    """A temporary copy of what the tests need, without history, environments and caches."""
    hidden = (".git", ".venv*", ".coverage", ".hypothesis", ".*_cache")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(*hidden, "__pycache__", "*.egg-info", "build", "out")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
        yield tree


def run_tests(tree: Path, tests: list[str]) -> str | None:
    """The first test that fails, or None.

    Raises:
        RuntimeError: the tests could not be run: nothing was collected, or importing failed.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    if result.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) ([^ \[]+::\w+)", result.stdout, re.MULTILINE)
    if result.returncode != 1 or not failed:
        raise RuntimeError(f"pytest ended with {result.returncode}:\n{result.stdout[-3000:]}")
    return failed[1]


def planted(fault: Fault) -> str:
    """The text of the fault's file with the fault in it.

    Raises:
        ValueError: the text to replace does not occur exactly once.
    """
    text = (ROOT / fault.file).read_text()
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.what}: {fault.old!r} occurs {count} times in {fault.file}")
    return text.replace(fault.old, fault.new)


def killer(fault: Fault) -> str | None:
    """The test that finds the fault, or None if it survives."""
    with copy_of_tree() as tree:
        (tree / fault.file).write_text(planted(fault))
        try:
            found = run_tests(tree, fault.tests.split())
        except RuntimeError as error:
            raise RuntimeError(f"{fault.what} ({fault.file}): {error}") from None
    print(f"{found or 'SURVIVES':<90} {fault.what}", flush=True)
    return found


def check_unmutated(faults: list[Fault]) -> None:
    """All tests of all faults pass, and they test the copy.

    Raises:
        RuntimeError: they do not.
    """
    with copy_of_tree() as tree:
        code = "import agc_triton; print(agc_triton.__file__)"
        used = subprocess.check_output([sys.executable, "-c", code], cwd=tree, text=True)
        if not Path(used.strip()).is_relative_to(tree):
            raise RuntimeError(f"the tests would import {used.strip()}, not the copy in {tree}")
        tests = sorted({test for fault in faults for test in fault.tests.split()})
        if failed := run_tests(tree, tests):
            raise RuntimeError(f"{failed} fails without any fault")


def report(table: pd.DataFrame) -> str:
    """Markdown from the columns what, file and killer."""
    table["killer"] = table["killer"].str.removeprefix("tests/")
    table["file"], table["killer"] = "`" + table["file"] + "`", "`" + table["killer"] + "`"
    rows = [["fault", "file", "found by"], ["---"] * 3, *table.to_numpy().tolist()]
    header = HEADER.format(version=our_version(), count=len(table))
    return header + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Plant every fault, then write the table or name what survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="pytest runs at a time")
    parser.add_argument("--only", default="", help="what a fault's description has to contain")
    arguments = parser.parse_args()
    processes = arguments.processes
    faults = [fault for fault in read_faults() if arguments.only in fault.what]
    for fault in faults:
        planted(fault)
    check_unmutated(faults)
    with ThreadPoolExecutor(processes) as pool:
        killers = list(pool.map(killer, faults))
    table = pd.DataFrame(faults)[["what", "file"]].assign(killer=pd.Series(killers))
    survivors = table[table["killer"].isna()]
    if len(survivors):
        sys.exit(f"{len(survivors)} of {len(table)} faults survive:\n{survivors.to_string()}")
    if not arguments.only:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(report(table))


if __name__ == "__main__":
    main()
