"""The workflows, which nothing runs here, agree with the package and the Makefile."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import yaml

import agc_triton
from tests.support.markdown import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS: dict[str, dict[str, Any]] = {name: yaml.safe_load(FILES[name])["jobs"] for name in FILES}
TESTED: dict[str, Any] = JOBS["ci"]["tests"]["strategy"]["matrix"]


def versions(texts: list[str]) -> list[str]:
    """What ends with a number of Python 3 or of torch 2, in their order."""
    found = [re.search(r"\b[23]\.\d+$", text) for text in texts]
    return [match[0] for match in found if match]


def runs(job: dict[str, Any]) -> list[str]:
    """The commands of a job, for each target that it is run for."""
    targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
    commands = [step["run"] for step in job.get("steps", ()) if "run" in step]
    return [c.replace("${{ matrix.target }}", target) for c in commands for target in targets]


@pytest.mark.parametrize("name", FILES)
def test_what_they_make_the_makefile_makes(name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {word for job in JOBS[name].values() for run in runs(job) for word in making(run)}
    assert made
    assert made <= targets


def making(command: str) -> list[str]:
    return re.findall(r"\bmake (\S+)", command)


def test_lint_types_tests_build_and_docs_are_run() -> None:
    made = {word for job in JOBS["ci"].values() for run in runs(job) for word in making(run)}
    assert made == {"lint", "types", "test", "build", "docs"}
    assert any("-m pytest" in run for run in runs(JOBS["ci"]["tests"]))


def test_every_python_that_is_named_is_tested() -> None:
    assert TESTED["python"] == versions(PROJECT["classifiers"])
    assert PROJECT["requires-python"] == f">={TESTED['python'][0]}"


def test_torch_is_tested_at_both_ends_of_what_the_readme_names() -> None:
    table = re.findall(
        r"^\| (2\.\d+) to (2\.\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert TESTED["torch"] == [table[0][0], table[-1][1]]
    assert f"torch>={TESTED['torch'][0]}" in PROJECT["dependencies"]


def test_only_publishing_may_ask_for_an_identity_and_nothing_holds_a_secret() -> None:
    assert not any("secrets." in text or "password" in text for text in FILES.values())
    for name, jobs in JOBS.items():
        assert yaml.safe_load(FILES[name])["permissions"] == {"contents": "read"}
        asking = [job for job, given in jobs.items() if "permissions" in given]
        assert asking == (["publish"] if name == "release" else [])
    publish = JOBS["release"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert any("pypa/gh-action-pypi-publish@" in step["uses"] for step in publish["steps"])


def test_nothing_is_published_that_was_not_tested() -> None:
    release = JOBS["release"]
    assert (release["publish"]["needs"], release["build"]["needs"]) == ("build", "ci")
    assert release["ci"] == {"uses": "./.github/workflows/ci.yml"}


def test_the_version_is_that_of_changelog_and_citation() -> None:
    first = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert first[1] == cited["version"] == agc_triton.__version__
    assert first[2] == str(cited["date-released"])
