"""Whatever a training loop does to an optimizer, in any order: each step is as the oracle says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agc_triton.torch_path import blocks
from tests.support.optimizers import EACH_RULE, EACH_WAY, NAMES
from tests.support.sequences import NARROW, OPERATIONS, WIDE, Loop

every_name = pytest.mark.parametrize("name", EACH_RULE)
all_dtypes = pytest.mark.parametrize("dtypes", [WIDE, NARROW], ids=["wide", "narrow"])


def by_turns(names: Sequence[str]) -> pytest.MarkDecorator:
    """Each with one set of dtypes."""
    pairs = [(name, (WIDE, NARROW)[i % 2]) for i, name in enumerate(names)]
    return pytest.mark.parametrize(("name", "dtypes"), pairs, ids=str)


# Without clipping the limit is inf, times 0 where nothing is: numpy, which interprets, warns of it.
interpreted = pytest.mark.filterwarnings("ignore:invalid value .* in multiply:RuntimeWarning")


def run(name: str, backend: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject) -> None:
    """Every operation once, in any order, each with a step behind it."""
    loop = Loop(name, backend, dtypes, data)
    loop.backward()
    loop.step()
    for operation in data.draw(st.permutations(OPERATIONS)):
        operation(loop)
        if data.draw(st.booleans()):
            loop.backward()
        loop.step()


def run_on_torch(name: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):  # blocks that cut units, nothing in batches
            patch.setattr(blocks, "BLOCK", 8)
            patch.setattr(blocks, "PACKED", 0)
        run(name, "torch", dtypes, data)


@by_turns(NAMES)
@settings(max_examples=6)
@given(data=st.data())
def test_the_torch_path(name: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject) -> None:
    run_on_torch(name, dtypes, data)


@interpreted
@by_turns(EACH_WAY)
@settings(max_examples=3)
@given(data=st.data())
def test_the_triton_path(name: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject) -> None:
    run(name, "triton", dtypes, data)


@pytest.mark.soak
@all_dtypes
@every_name
@settings(max_examples=150)
@given(data=st.data())
def test_many_sequences_on_the_torch_path(
    name: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject
) -> None:
    run_on_torch(name, dtypes, data)


@pytest.mark.soak
@interpreted
@all_dtypes
@every_name
@settings(max_examples=20)
@given(data=st.data())
def test_many_sequences_on_the_triton_path(
    name: str, dtypes: tuple[torch.dtype, ...], data: st.DataObject
) -> None:
    run(name, "triton", dtypes, data)
