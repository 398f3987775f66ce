"""The table of planted faults fits the code; `make mutations`, which takes long, runs it."""

from __future__ import annotations

import pytest

from tests.meta.mutations import ROOT, Fault, planted, read_faults


@pytest.mark.parametrize("fault", read_faults(), ids=lambda fault: fault.what)
def test_a_fault_changes_its_file(fault: Fault) -> None:
    assert planted(fault) != (ROOT / fault.file).read_text()
    for test in fault.tests.split():
        assert (ROOT / test.partition("::")[0]).is_file()


def test_a_text_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"'no such text' occurs 0 times in README.md"):
        planted(Fault("README.md", "nothing", "no such text", "", ""))
