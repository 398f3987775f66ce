"""What type checkers and editors are told of the optimizers is true, and finds mistakes."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import agc_triton
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.options import AGCArguments
from tests.support.optimizers import NAMES

ROOT = Path(__file__).parents[2]

# mypy, run over all tests before this one, complains where one of its ignores is not needed.
SCRIPT = ROOT / "tests" / "meta" / "typed_use.py"


def output(folder: Path, *arguments: str | Path) -> str:
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # there are mistakes to be found
    return done.stdout


def pyright(folder: Path, script: Path) -> set[int]:
    settings = {
        "typeCheckingMode": "standard",
        "extraPaths": [str(ROOT)],
        "enableTypeIgnoreComments": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    python = "--pythonpath", sys.executable
    reports = json.loads(output(folder, "basedpyright", "--outputjson", *python, script))
    found = reports["generalDiagnostics"]
    return {1 + r["range"]["start"]["line"] for r in found if r["severity"] == "error"}


def test_pyright_finds_what_mypy_does(tmp_path: Path) -> None:
    lines = SCRIPT.read_text().splitlines()
    expected = {number for number, line in enumerate(lines, 1) if "type: ignore" in line}
    found = pyright(tmp_path, SCRIPT)
    assert found == expected, [lines[number - 1] for number in found ^ expected]


def stub(cls: type[Any]) -> ast.arguments:
    """What a class's constructor is said to take."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return node.args
    raise ValueError(f"{cls} has none")


@pytest.mark.parametrize("name", NAMES)
def test_what_checkers_are_told_is_what_the_classes_take(name: str) -> None:
    cls = getattr(agc_triton, f"{name}_AGC")
    args = stub(cls)
    told: dict[str, Any] = {}
    positional = args.args[1:]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for argument, default in zip(
        [*positional, *args.kwonlyargs], [*defaults, *args.kw_defaults], strict=True
    ):
        told[argument.arg] = inspect.Parameter.empty
        if default is not None:
            told[argument.arg] = ast.literal_eval(default)
    (*_, ours) = ast.unparse(args).split(", ")
    assert ours == "**ours: Unpack[AGCArguments]"
    taken = inspect.signature(cls).parameters
    theirs = {key: taken[key] for key in taken.keys() - AGCArguments.__annotations__.keys()}
    assert told == {key: parameter.default for key, parameter in theirs.items()}
    by_name = {key for key, parameter in theirs.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert by_name == {argument.arg for argument in args.kwonlyargs}


def test_checkers_are_told_of_all_options() -> None:
    taken = inspect.signature(AGCOptimizer).parameters.values()
    ours = {p.name: p.annotation for p in taken if p.kind is p.KEYWORD_ONLY}
    told = AGCArguments.__annotations__
    assert {key: hint.__forward_arg__ for key, hint in told.items()} == ours
