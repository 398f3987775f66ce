"""The README's examples run as they stand, one after the other, and so do those that go on there.

What is said of them is true, and links lead somewhere.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from agc_triton.optim import OPTIMIZERS
from tests.support.markdown import PAGES, ROOT, examples, links, run_examples
from tests.support.tensors import same

README = (ROOT / "README.md").read_text()
CHECKPOINTS = (ROOT / "docs" / "checkpoints.md").read_text()


def names_of_readme() -> dict[str, Any]:
    return run_examples(README, {})


def test_what_is_clipped_is_told_and_suggested() -> None:
    names = names_of_readme()
    model, adamw, table = names["model"], names["adamw"], names["table"]
    assert set(table["level"]) == {"parameter", "group", "total"}
    assert adamw.clip_stats()["step"].iloc[-1] == 5
    for group in adamw.param_groups:
        if group["clipping"]:
            group["clipping"] = table["suggested"].iloc[-1]
    again = names["suggest_clipping"](model, names["loss_fn"], names["batches"], adamw)
    assert again["clipped"].iloc[-1] == pytest.approx(0.1, abs=0.05)  # after eight small steps


def test_a_checkpoint_of_one_group_goes_into_those_of_param_groups() -> None:
    names = names_of_readme()
    model, optimizer = names["model"], names["optimizer"]
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 10)).square().mean().backward()
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    (recipe,) = examples(CHECKPOINTS)
    first, _, others = recipe.partition("\n")
    assert first.startswith("old = ")
    exec(others, {**names, "old": saved})
    for p in model.parameters():
        assert same(optimizer.state[p], theirs.state[p])


@pytest.mark.parametrize("page", ["groups", "checkpoints", "choosing-clipping"])
def test_examples_that_go_on_from_the_readme_run(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert examples(text)
    assert not run_examples(text, names_of_readme())["optimizer"].state


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 250


def slug(heading: str) -> str:
    """The fragment of a link to a heading, on GitHub and in the site."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def broken(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    found = []
    for link in links(page.read_text()):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file():
            found.append(link)
        elif fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            found += [link] * (fragment not in map(slug, headings))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken(page) == []


def test_links_that_lead_nowhere_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A (b) `c`\n[1](page.md#a-b-c) ![2](no.png) [3](#d)\n`[4](no.md)` [5](https://e.f)"
    )
    assert broken(page) == ["no.png", "#d"]


def test_all_classes_are_in_the_table() -> None:
    (row,) = [line for line in README.splitlines() if line.startswith("| `SGD`")]
    assert re.findall(r"`(\w+)`", row.split("|")[1]) == list(OPTIMIZERS)
