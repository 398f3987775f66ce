"""The README's examples run as they stand, one after the other, and do what is said of them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from agc_triton import adaptive_clip_grad_
from tests.support.tensors import same

README = Path(__file__).parents[2] / "README.md"


def run_examples(last: str) -> dict[str, Any]:
    """The names there are after the examples up to the one that holds a text."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block, names)
        if last in block:
            return names
    raise ValueError(f"no example holds {last!r}")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_share_of_units_clipped_is_that_of_units_changed(scale: float) -> None:
    names = run_examples("def clipped_share")
    (model, optimizer), changed, units = (names["model"], names["optimizer"]), 0, 0
    (scale * model(torch.randn(8, 10)).square().mean()).backward()
    share = names["clipped_share"](optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["clipping"]:
                before = p.grad.clone()
                adaptive_clip_grad_([p], clipping=group["clipping"], agc_eps=group["agc_eps"])
                rows = p.grad.flatten(1) if p.dim() > 1 else p.grad[None]
                changed += int((rows != before.reshape(rows.shape)).any(1).sum())
                units += len(rows)
    assert share == changed / units


def test_a_checkpoint_of_one_group_goes_into_those_of_param_groups() -> None:
    names = run_examples("def clipped_share")
    model, optimizer = names["model"], names["optimizer"]
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 10)).square().mean().backward()
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    (recipe,) = re.findall(r"```python\nold = .*?\n(.*?)```", README.read_text(), re.DOTALL)
    exec(recipe, {**names, "old": saved})
    for p in model.parameters():
        assert same(optimizer.state[p], theirs.state[p])


def test_all_examples_run() -> None:
    names = run_examples("optimizer.load_state_dict(state)")
    assert not names["optimizer"].state
