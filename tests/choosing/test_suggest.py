"""suggest_clipping says what clips a share of units, beside quantiles in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer, SparseAdam

from agc_triton import AGC, SGD_AGC, AdamW_AGC, param_groups, suggest_clipping
from tests.choosing.given import Grads, given_batches, given_loss, given_model
from tests.support.oracle import norm
from tests.support.places import DEVICE
from tests.support.rounded import Rounded, as_float64, exact
from tests.support.tolerances import TOLERANCES

TARGET = 0.3
PERCENTILES = {"ratio_5": 0.05, "ratio_50": 0.5, "ratio_95": 0.95, "ratio_max": 1.0}
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16)}


def ratios_of(model: nn.Module, batches: list[Grads], i: int, **options: Any) -> list[Rounded]:
    """The i-th parameter's ratios by the definition, batch by batch."""
    p = list(model.parameters())[i]
    unit_dim = None if sum(size != 1 for size in p.shape) <= 1 else options.get("unit_dim") or 0
    axes = tuple(d for d in range(p.dim()) if d != unit_dim)
    where = TOLERANCES[str(p.dtype).removeprefix("torch.")]
    found = []
    for grads in batches:
        if (grad := grads[i]) is not None:
            g, w = (norm(exact(as_float64(t), p.dtype).to(where.norms), axes) for t in (grad, p))
            found.append(g / w.maximum(options.get("agc_eps", 1e-3)))
    return found


def check_row(row: pd.Series[Any], ratios: list[Rounded], clipping: float, target: float) -> None:
    """A quantile is off by no more than the values that it is of."""
    values = np.concatenate([r.value.ravel() for r in ratios])
    error = max(r.error.max() for r in ratios)
    for key, share in {**PERCENTILES, "suggested": 1 - target}.items():
        assert abs(row[key] - np.quantile(values, share)) <= error, key
    assert row["clipped"] == (np.mean(values > clipping) if clipping else 0)
    assert abs(np.mean(values > row["suggested"]) - target) <= 1 / len(values)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_without_an_optimizer_all_parameters_have_the_defaults(dtype: torch.dtype) -> None:
    model = given_model(dtype=dtype)
    batches = given_batches(model)
    table = suggest_clipping(model, given_loss, batches, target=TARGET)
    names = [name for name, _ in model.named_parameters()]
    assert table["name"].tolist() == [*names, "group 0", "total"]
    assert table["level"].tolist() == ["parameter"] * len(names) + ["group", "total"]
    assert set(table["clipping"]) == {0.01}
    assert set(table["batches"]) == {3}
    everything = []
    for i, p in enumerate(model.parameters()):
        ratios = ratios_of(model, batches, i)
        everything += ratios
        check_row(table.iloc[i], ratios, 0.01, TARGET)
        assert table["shape"][i] == tuple(p.shape)
        assert table["units"][i] == ratios[0].value.size
    for i in (-1, -2):
        check_row(table.iloc[i], everything, 0.01, TARGET)
        assert table["units"].iloc[i] == table["units"][: len(names)].sum()


def in_three_groups(model: nn.ParameterDict) -> list[dict[str, Any]]:
    first, second, *others = model.named_parameters()
    return [
        {"params": [first], "clipping": 0.02, "agc_eps": 5.0},
        {"params": [second], "clipping": 1.0, "unit_dim": 1},
        {"params": others, "clipping": 0.0},
    ]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda groups: AdamW_AGC(groups), id="AdamW_AGC"),
        pytest.param(lambda groups: AGC(SGD(groups, lr=0.1)), id="AGC"),
    ],
)
def test_groups_have_their_own_options(make: Any) -> None:
    model = given_model()
    batches = given_batches(model)
    table = suggest_clipping(model, given_loss, batches, make(in_three_groups(model)), TARGET)
    options: list[dict[str, Any]] = [{"agc_eps": 5.0}, {"unit_dim": 1}, {}, {}, {}]
    clipping = [0.02, 1.0, 0.0, 0.0, 0.0]
    ratios = [ratios_of(model, batches, i, **options[i]) for i in range(5)]
    for i in range(5):
        check_row(table.iloc[i], ratios[i], clipping[i], TARGET)
    assert table["group"].tolist() == [0, 1, 2, 2, 2, 0, 1, 2, -1]
    rest = [r for of_one in ratios[2:] for r in of_one]
    for i, of_group in enumerate([ratios[0], ratios[1], rest]):
        check_row(table.iloc[5 + i], of_group, clipping[i], TARGET)
    # What is not clipped is not among all.
    total = table.iloc[-1]
    assert math.isnan(total["clipping"])
    both = [np.concatenate([r.value.ravel() for r in of_one]) for of_one in ratios[:2]]
    error = max(r.error.max() for of_one in ratios[:2] for r in of_one)
    assert abs(total["suggested"] - np.quantile(np.concatenate(both), 1 - TARGET)) <= error
    over = sum(np.sum(values > c) for values, c in zip(both, clipping, strict=False))
    assert total["clipped"] == over / sum(map(len, both))


def test_a_group_clipped_as_suggested_has_that_share_clipped() -> None:
    model = given_model()
    batches = given_batches(model)
    optimizer = SGD_AGC(model.parameters(), lr=0.1, clipping=1.0)
    found = suggest_clipping(model, given_loss, batches, optimizer, TARGET)["suggested"].iloc[-1]
    optimizer.param_groups[0]["clipping"] = found
    again = suggest_clipping(model, given_loss, batches, optimizer, TARGET).iloc[-1]
    assert again["clipping"] == found
    assert again["clipped"] == pytest.approx(TARGET, abs=1 / (3 * again["units"]))


def test_what_has_no_gradient_is_named_and_what_has_one_at_times_counts_then() -> None:
    model = given_model()
    never, at_times, *_ = model
    batches = given_batches(model)
    batches = [[None, g[1] if i else None, *g[2:]] for i, g in enumerate(batches)]
    table = suggest_clipping(model, given_loss, batches, target=TARGET).set_index("name")
    missing = table.loc[never, ["clipped", *PERCENTILES, "suggested"]]
    assert missing.isna().all()
    assert table["batches"][[never, at_times, "total"]].tolist() == [0, 2, 3]
    check_row(table.iloc[1], ratios_of(model, batches, 1), 0.01, TARGET)
    assert table.loc["total"].notna().all()


def test_nothing_is_suggested_where_too_few_units_have_a_gradient() -> None:
    model = given_model([(10, 4)])
    (grad,) = given_batches(model, 1)[0]
    assert grad is not None
    grad[2:] = 0
    for target, is_there in ((0.1, True), (0.3, False)):
        table = suggest_clipping(model, given_loss, [[grad]], target=target)
        assert table["suggested"].notna().tolist() == [is_there] * 3
        assert table["ratio_50"].tolist() == [0.0] * 3


def test_a_ratio_of_two_zeros_is_zero() -> None:
    model = given_model([(3, 4)])
    with torch.no_grad():
        model["p0"][0] = 0
    grad = torch.ones_like(model["p0"])
    grad[0] = 0
    optimizer = SGD_AGC(model.parameters(), lr=0.1, agc_eps=0.0)
    assert suggest_clipping(model, given_loss, [[grad]], optimizer)["ratio_5"].min() >= 0


def test_units_follow_the_layers_of_param_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.Flatten(), nn.Linear(54, 3)).to(DEVICE)
    optimizer = SGD_AGC(param_groups(model), lr=0.1)
    batch = torch.ones(2, 4, 2, 2, device=DEVICE)
    table = suggest_clipping(model, lambda net, x: net(x).square().mean(), [batch], optimizer)
    units = table.set_index("name")["units"]
    assert units[["0.weight", "0.bias", "2.weight", "total"]].tolist() == [6, 1, 3, 7]


def test_sparse_gradients_have_units_without_a_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, sparse=True).to(DEVICE)
    optimizer = AGC(SparseAdam(model.parameters()))
    rows = torch.tensor([1, 1, 3], device=DEVICE)
    table = suggest_clipping(model, lambda net, x: net(x).sum(), [rows], optimizer)
    w = as_float64(model.weight)
    expected = np.zeros(10)
    expected[[1, 3]] = np.array([4.0, 2.0]) / np.linalg.norm(w[[1, 3]], axis=1)
    assert table["ratio_max"][0] == pytest.approx(expected.max(), rel=1e-6)
    assert table["clipped"][0] == 0.2


def test_an_optimizer_of_torch_counts_as_one_with_the_defaults() -> None:
    model = given_model()
    batches = given_batches(model)
    plain: Optimizer = SGD(model.parameters(), lr=0.1)
    pd.testing.assert_frame_equal(
        suggest_clipping(model, given_loss, batches, plain),
        suggest_clipping(model, given_loss, batches),
    )


def test_names_are_those_of_the_model_that_is_wrapped_and_of_the_optimizer() -> None:
    model = given_model([(3, 4)])
    scale = nn.Parameter(torch.ones(2, 2, device=DEVICE))

    def loss_fn(net: Any, grads: Any) -> torch.Tensor:
        return given_loss(net.module, grads) + scale.sum()

    optimizer = SGD_AGC([{"params": [*model.parameters()]}, {"params": [scale]}], lr=0.1)
    batches = given_batches(model)
    table = suggest_clipping(nn.DataParallel(model), loss_fn, batches, optimizer)
    assert table["name"].tolist()[:2] == ["p0", "parameter 0 of group 1"]
    named = SGD_AGC([("p", model["p0"]), ("scale", scale)], lr=0.1)
    table = suggest_clipping(nn.DataParallel(model), loss_fn, batches, named)
    assert table["name"].tolist()[:2] == ["p0", "scale"]
