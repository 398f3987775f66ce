"""What `clip_stats`, `clip_log` and `clip_histograms` make of records, and the warning."""

from __future__ import annotations

import math
import sys
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agc_triton import AGC, SGD_AGC, AdamW_AGC, tracking
from tests.support.places import DEVICE
from tests.support.ratios import RTOL, ratios_of
from tests.support.tensors import assign, grads_like, weights

SHAPES = [(6, 5), (4, 3, 2, 2), (6,), (40, 3)]
NAMES = ["fc.weight", "conv.weight", "conv.bias", "head.weight"]
CLIPPING = [0.05, 0.05, 0.5, 0.0]


def named(**options: Any) -> tuple[list[Tensor], Any]:
    """Weights with names, in a group each, and an optimizer."""
    params = [p.requires_grad_() for p in weights(SHAPES, device=DEVICE)]
    groups = [
        {"params": [(name, p)], "clipping": clipping}
        for name, p, clipping in zip(NAMES, params, CLIPPING, strict=True)
    ]
    return params, SGD_AGC(groups, lr=0.0, **options)


def numbers_of(ratios: Any, norms: Any, limits: Any) -> dict[str, float]:
    """The columns, from their definitions."""
    left = np.minimum(ratios, limits) * norms
    ordered = np.sort(ratios)
    at = {
        key: math.ceil(q * len(ordered)) - 1 for key, q in (("5", 0.05), ("50", 0.5), ("95", 0.95))
    }
    return {
        "clipped": float(np.mean(ratios > limits)),
        **{f"ratio_{key}": float(ordered[max(i, 0)]) for key, i in at.items()},
        "ratio_max": float(ordered[-1]),
        "removed": 1.0 - float(np.sqrt(np.sum(left**2) / np.sum((ratios * norms) ** 2))),
    }


def test_the_table_and_its_total() -> None:
    params, optimizer = named(track_clipping=1)
    grads = grads_like([p.detach() for p in params])
    assign(params, grads)
    optimizer.step()  # lr 0: weights stay, and so do their norms
    table = optimizer.clip_stats()
    assert list(table["name"]) == [*NAMES, "total"]
    assert list(table["group"]) == [0, 1, 2, 3, -1]
    assert list(table["shape"]) == [*SHAPES, ()]
    assert list(table["units"]) == [6, 4, 1, 40, 51]
    assert list(table["clipping"][:4]) == CLIPPING
    assert set(table["step"]) == {1}
    units = []
    for row, p, grad, clipping in zip(
        table.to_dict("records"), params, grads, CLIPPING, strict=False
    ):
        ratios = ratios_of(p, grad)
        norms = ratios_of(torch.zeros_like(p), p, agc_eps=1.0)  # over a weight norm of 1
        own = ratios, norms, np.full(len(ratios), clipping or math.inf)
        expected = numbers_of(*own)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=RTOL, abs=1e-6)
        units += [own] if clipping else []
    total = numbers_of(*(np.concatenate(each) for each in zip(*units, strict=True)))
    last = table.iloc[-1]
    assert {key: last[key] for key in total} == pytest.approx(total, rel=RTOL, abs=1e-6)
    assert 0 < total["clipped"] < 1
    assert 0 < total["removed"] < 1
    log = optimizer.clip_log()
    assert list(log) == ["clipped", "ratio_50", "ratio_95", "ratio_max", "removed"]
    assert log == {key: last[key] for key in log}


def test_what_has_no_record_yet_is_not_a_number() -> None:
    params, optimizer = named(track_clipping=1)
    assert all(map(math.isnan, optimizer.clip_log().values()))
    assign(params[1:], grads_like(params[1:]))
    optimizer.step()
    table = optimizer.clip_stats()
    assert list(table["step"]) == [0, 1, 1, 1, 1]
    assert list(table["units"]) == [0, 4, 1, 40, 45]
    assert table["ratio_50"].isna().tolist() == [True, False, False, False, False]


def test_infinite_ratios_are_clipped_and_nan_is_left_out() -> None:
    params, optimizer = named(track_clipping=1, nonfinite="skip_unit")
    grads = grads_like(params)
    grads[0][0, 0], grads[0][1, 1] = torch.inf, torch.nan
    assign(params, grads)
    optimizer.step()
    row = optimizer.clip_stats().iloc[0]
    assert row["ratio_max"] == math.inf
    expected = np.delete(ratios_of(params[0], grads[0]), 1)
    assert row["clipped"] == np.mean(expected > CLIPPING[0])
    assert row["removed"] == 1.0


def test_nothing_tracked_is_an_error_that_says_what_to_do() -> None:
    for optimizer in (named()[1], AGC(torch.optim.SGD(weights()))):
        asked = optimizer.clip_stats, optimizer.clip_log, partial(optimizer.clip_histograms, None)
        for ask in asked:
            with pytest.raises(RuntimeError, match=r"call track_clipping\(\) before the steps"):
                ask()


def test_without_pandas_the_five_numbers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = named(track_clipping=1)
    assign(params, grads_like(params))
    optimizer.step()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"clip_stats\(\) makes .* pip install pandas"):
        optimizer.clip_stats()
    assert optimizer.clip_log()["clipped"] > 0


class Writer:
    """What a SummaryWriter is asked."""

    def __init__(self) -> None:
        self.added: list[tuple[str, Tensor, int | None]] = []

    def add_histogram(self, tag: str, values: Tensor, global_step: int | None) -> None:
        self.added.append((tag, values, global_step))


def test_histograms() -> None:
    params, optimizer = named(track_clipping=1)
    grads = grads_like(params)
    grads[3].zero_()
    grads[1][2] = torch.inf
    assign(params, grads)
    optimizer.step()
    writer = Writer()
    optimizer.clip_histograms(writer, 7)
    assert [tag for tag, _, _ in writer.added] == [f"agc log10 ratio/{n}" for n in NAMES[:3]]
    assert {step for _, _, step in writer.added} == {7}
    expected = np.log10(ratios_of(params[0], grads[0]))
    np.testing.assert_allclose(writer.added[0][1].numpy(), expected, rtol=RTOL, atol=RTOL)
    assert len(writer.added[1][1]) == 3  # but the infinite one
    unnamed: Any = AdamW_AGC(params, track_clipping=1)
    unnamed.step()
    writer = Writer()
    unnamed.clip_histograms(writer)
    assert writer.added[0][0] == "agc log10 ratio/group 0/parameter 0"


def told(optimizer: Any, params: list[Tensor], scales: list[float]) -> list[str]:
    """What is warned of in steps whose gradients are so many times their parameters."""
    found = []
    for scale in scales:
        assign(params, [p * scale for p in params])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found += [str(warning.message) for warning in caught]
    return found


def watched(**options: Any) -> tuple[list[Tensor], Any]:
    params = weights([(20, 5), (20, 4)], device=DEVICE)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "clipping": 0}]
    return params, SGD_AGC(groups, lr=0.0, clipping=0.05, **options)


def test_a_clip_of_everything_is_told_once() -> None:
    params, optimizer = watched(track_clipping=2)
    steps = [1.0] * 18  # of which nine are tracked
    assert told(optimizer, params, steps) == []
    (message,) = told(optimizer, params, [1.0] * 12)
    assert "clipping=0.05 clipped over 90% of the units in each of the first 10" in message
    assert "suggest_clipping" in message
    assert "track_clipping(..., warn=False)" in message
    assert told(optimizer, params, [1.0] * 30) == []


def test_a_clip_of_nothing_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "NONE_IN", 30)
    params, optimizer = watched(track_clipping=1)
    (message,) = told(optimizer, params, [1e-4] * 31)
    assert "clipping=0.05 clipped no unit in any of the first 30" in message
    assert told(optimizer, params, [1e-4] * 40) == []


@pytest.mark.parametrize("scales", [[1.0] * 9 + [1e-4], [1e-4] + [1.0] * 9, [1e-4] * 29 + [1.0]])
def test_one_step_that_differs_is_enough(
    scales: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "NONE_IN", 30)
    params, optimizer = watched(track_clipping=1)
    assert told(optimizer, params, scales + scales[:1] * 40) == []


def test_nothing_is_told_where_it_is_turned_off_or_nothing_is_tracked() -> None:
    for options in ({}, {"track_clipping": 1}):
        params, optimizer = watched(**options)
        if options:
            optimizer.track_clipping(1, warn=False)
        assert told(optimizer, params, [1.0] * 20) == []
        assert optimizer._recorder._watch is None


def test_steps_that_grad_scaler_skips_are_not_among_the_first() -> None:
    params, optimizer = watched(track_clipping=1)
    optimizer.grad_scale = torch.ones((), device=DEVICE)
    found_inf = optimizer.found_inf = torch.ones((), device=DEVICE)
    assert told(optimizer, params, [1.0] * 20) == []
    found_inf.zero_()
    assert told(optimizer, params, [1.0] * 9) == []
    found_inf.fill_(1.0)
    assert told(optimizer, params, [1.0] * 5) == []
    found_inf.zero_()
    assert len(told(optimizer, params, [1.0] * 2)) == 1


def test_the_wrapper_is_watched_too() -> None:
    params = weights([(20, 5)], device=DEVICE)
    optimizer = AGC(torch.optim.SGD(params, lr=0.0), clipping=0.05, track_clipping=1)
    assert len(told(optimizer, params, [1.0] * 11)) == 1
