"""What type checkers and editors are told of the optimizers is true, and finds mistakes."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agc_triton
from tests.support.optimizers import NAMES, PAIRS

ROOT = Path(__file__).parents[2]

# A checker must complain of the lines that end with an X, and of no others.
SCRIPT = """\
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

from agc_triton import AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC, SGD_AGC
from agc_triton import adaptive_clip_grad_, param_groups

model = nn.Linear(2, 2)
p = list(model.parameters())

AdamW_AGC(p, learning_rate=1e-3)  # X
SGD_AGC(p, lr="x")  # X
RMSprop_AGC(p, betas=(0.9, 0.99))  # X
Adam_AGC(p, betas=0.9)  # X
SGD_AGC(p, clipping="x")  # X
SGD_AGC(p, cliping=0.1)  # X
SGD_AGC(p, 0.1, 0.9, 0.0, 0.0, True, 0.01)  # X
adaptive_clip_grad_(p, 0.01)  # X
AGC(p)  # X
AGC(SGD(p), cliping=0.1)  # X

sgd = SGD_AGC(p, 0.1, 0.9, nesterov=True, clipping=None, unit_dim=((0, 2), 1), backend="torch")
adam = Adam_AGC(p, torch.tensor(0.1), (0.9, 0.99), amsgrad=True, decoupled_weight_decay=True)
adamw = AdamW_AGC(param_groups(model), lr=1e-3, foreach=True, nonfinite="skip_unit")
rmsprop = RMSprop_AGC(model.named_parameters(), alpha=0.9, centered=True, agc_eps=1e-4)
wrapped = AGC(SGD(p), clipping=0.1, backend="auto", nonfinite="raise")
optimizers: list[Optimizer] = [sgd, adam, adamw, rmsprop, wrapped]
StepLR(wrapped, 1)


def as_tensor() -> Tensor:
    return torch.zeros(())


def as_float() -> float:
    return 0.0


loss: Tensor = sgd.step(as_tensor)
loss = wrapped.step(as_tensor)
value: float = adamw.step(as_float)
sgd.step()
wrong: str = sgd.step(as_float)  # X
sgd.backend = 1  # X
sgd.backend = "torch"
adaptive_clip_grad_(p, clipping=0.01, unit_dim="tensor")
"""


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


def mypy(folder: Path, script: Path) -> set[int]:
    cache = folder / "cache"
    options = "--strict", "--follow-imports=silent", "--output=json", "--cache-dir", cache
    found = output(folder, "mypy", *options, script)
    reports = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    return {report["line"] for report in reports if report["severity"] == "error"}


def pyright(folder: Path, script: Path) -> set[int]:
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    python = "--pythonpath", sys.executable
    reports = json.loads(output(folder, "basedpyright", "--outputjson", *python, script))
    found = reports["generalDiagnostics"]
    return {1 + r["range"]["start"]["line"] for r in found if r["severity"] == "error"}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_checkers_find_mistakes_and_only_those(
    checker: Callable[[Path, Path], set[int]], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    lines = SCRIPT.splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# X")}
    found = checker(tmp_path, script)
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
    taken = inspect.signature(cls).parameters
    assert told == {key: parameter.default for key, parameter in taken.items()}
    by_name = {key for key, parameter in taken.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert by_name == {argument.arg for argument in args.kwonlyargs}


@pytest.mark.parametrize("cls", PAIRS)
def test_help_describes_all_arguments(cls: Any) -> None:
    documented = inspect.getdoc(PAIRS[cls])
    assert documented is not None
    for key in inspect.signature(PAIRS[cls]).parameters:
        assert f"\n    {key} (" in documented or f"\n    {key}: " in documented, key
