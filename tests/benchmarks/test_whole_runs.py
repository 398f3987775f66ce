"""What a whole run of throughput on a GPU compares; nothing is measured here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from benchmarks.lib.copying import copy_provider
from benchmarks.lib.patience import Patience
from benchmarks.lib.providers import Provider, providers
from tests.benchmarks.tiny import SHAPES, write_shapes

pytestmark = pytest.mark.usefixtures("gpu")


def compared_on_a_gpu(*arguments: str) -> dict[throughput.Group, list[Provider]]:
    """What would take turns in each group; nothing is measured."""
    args = throughput.parse(["--out", os.devnull, *arguments])
    patience = Patience(throughput.COMPILE_EACH)
    return {
        group: throughput.compared_in(group, args, patience) for group in throughput.groups(args)
    }


@pytest.fixture
def gpu(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the command line can see, and a second model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    write_shapes(tmp_path / "shapes" / "other.csv", SHAPES)


def names(compared: Iterable[Provider]) -> set[str]:
    return {p.implementation for p in compared}


def test_a_whole_run_on_a_gpu_measures_one_model_in_full_and_the_telling_ones_of_all() -> None:
    found = compared_on_a_gpu()
    assert [*{group.model: None for group in found}] == ["other", "tiny"]
    for group, compared in found.items():
        dtype = throughput.DTYPES[group.dtype]
        known = providers(group.optimizer, "cuda", dtype)
        copy = copy_provider(group.optimizer).implementation
        if group.model == "other":
            assert names(compared) == {copy, *names([p for p in known if p.quick])}
        else:
            assert names(compared) >= {copy, *names(known)}


def test_a_whole_run_on_a_gpu_compiles_where_it_is_worth_it_and_gives_up() -> None:
    for group, compared in compared_on_a_gpu().items():
        compiled = {p for p in compared if "torch.compile" in p.implementation}
        worth_it = group.model == "tiny" and group.optimizer in ("sgd", "adamw")
        assert names(compiled) == ({"timm AGC, torch.optim, torch.compile"} if worth_it else set())
        assert all(p.patience is not None and p.patience.each == 180 for p in compiled)


def test_all_is_compiled_without_a_limit_where_asked_to() -> None:
    for arguments in (["--compile"], ["--compile", "--quick"]):
        for compared in compared_on_a_gpu(*arguments).values():
            compiled = [p for p in compared if "torch.compile" in p.implementation]
            assert len(compiled) == 2
            assert [p.patience for p in compiled] == [None, None]


def test_models_that_are_asked_for_are_measured_in_full() -> None:
    for group, compared in compared_on_a_gpu("--models", "other").items():
        dtype = throughput.DTYPES[group.dtype]
        assert names(compared) >= names(providers(group.optimizer, "cuda", dtype))


@pytest.mark.parametrize("arguments", [[], ["--quick"]])
def test_at_least_ten_rounds_are_timed_on_a_gpu(arguments: list[str]) -> None:
    assert throughput.timed_rounds(throughput.parse(["--out", os.devnull, *arguments])) >= 10
