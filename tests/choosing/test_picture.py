"""The picture of suggest_clipping: what is drawn is what the table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from agc_triton import SGD_AGC, suggest_clipping
from agc_triton.choosing import picture
from tests.choosing.given import given_batches, given_loss, given_model


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved from now on."""
    found: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)
    return found


def suggested(path: Path) -> Any:
    """Two groups, the second not clipped; p1 has no gradient, and p3 one of 0."""
    model = given_model()
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "clipping": 0.0}]
    optimizer = SGD_AGC(groups, lr=0.1, clipping=0.05)
    batches = [[g[0], None, g[2], 0 * g[3], *g[4:]] for g in given_batches(model)]  # type: ignore[operator]  # all are tensors
    return suggest_clipping(model, given_loss, batches, optimizer, plot=path)


def test_thresholds_are_drawn_through_the_rows_of_their_group(
    figures: list[Any], tmp_path: Path
) -> None:
    table = suggested(tmp_path / "ratios.png")
    (ax,) = figures[0].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"p{i}" for i in range(5)]
    groups = table[table["level"] == "group"]["suggested"].tolist()
    lines = [
        (line.get_color(), line.get_xdata()[0], *line.get_ydata())
        for line in ax.lines
        if len(line.get_xdata()) == 2
    ]
    assert lines == [
        ("tab:red", 0.05, -0.5, 0.5),
        ("tab:blue", groups[0], -0.5, 0.5),
        ("tab:blue", groups[1], 0.5, 4.5),
    ]
    (own,) = (line for line in ax.lines if len(line.get_xdata()) == 5)
    np.testing.assert_array_equal(own.get_xdata(), table["suggested"][:5])
    assert [(text.get_text(), text.get_position()[1]) for text in ax.texts] == [
        ("no gradient", 1),
        ("100% are 0", 3),
    ]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "suggested for the parameter",
        "clipping as it is",
        "suggested for the group: clips 0.1 of its units",
    ]


def test_each_ratio_is_in_its_rows_histogram(figures: list[Any], tmp_path: Path) -> None:
    table = suggested(tmp_path / "ratios.svg")
    ridges = figures[0].axes[0].patches
    assert len(ridges) == 5
    for i in (0, 2, 4):
        tops, edges, baseline = ridges[i].get_data()
        assert baseline == i
        filled = np.flatnonzero(tops < i)
        assert edges[filled[0]] <= table["ratio_5"][i]
        assert edges[filled[-1] + 1] >= table["ratio_max"][i]
        assert tops.min() == pytest.approx(i - 0.9)
    for i in (1, 3):
        assert (ridges[i].get_data()[0] == i).all()
    assert (tmp_path / "ratios.svg").read_text().startswith("<?xml")


def test_many_rows_are_drawn_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert picture.LARGEST < 2**16  # of which matplotlib draws no more
    monkeypatch.setattr(picture, "LARGEST", 500)
    suggested(tmp_path / "low.png")
    assert 400 < int.from_bytes((tmp_path / "low.png").read_bytes()[20:24], "big") <= 500


@pytest.mark.soak
def test_hundreds_of_parameters_fit_into_a_file(tmp_path: Path) -> None:
    model = given_model([(2, 2)] * 1800)
    suggest_clipping(model, given_loss, given_batches(model, 1), plot=tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
