"""The table that explain() shows says what the plan of the next step is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from agc_triton import SGD_AGC
from tests.support.optimizers import EACH_WAY, NAMES, STATEFUL, TRITON, Kwargs, build
from tests.support.places import DEVICE, KERNELS
from tests.support.plans import bucket_plans
from tests.support.soak import soaked
from tests.support.tensors import TILE_SHAPES, in_order, set_grads, unaligned

SUMS = ["tensors", "units", "elements", "bytes", "launches"]

# State tensors per parameter, with STATEFUL's options.
STATES = {"SGD": 1, "Adam": 3, "AdamW": 3, "RMSprop": 3, "Adagrad": 1, "ASGD": 1}


def with_grads(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = KERNELS.weights(TILE_SHAPES, dtype)
    set_grads(params, 0)
    return params


def explained(optimizer: Any, **arguments: float) -> tuple[pd.DataFrame, pd.Series[Any]]:
    """The rows and the total, which must be their sum."""
    table = optimizer.explain(**arguments)
    rows, total = table.iloc[:-1], table.iloc[-1]
    assert total["class"] == "total"
    assert rows[SUMS].sum().to_dict() == total[SUMS].to_dict()
    return rows, total


@pytest.mark.parametrize(
    ("name", "dtype"),
    soaked(
        itertools.product(NAMES, (torch.float16, torch.float32, torch.float64)),
        lambda name, dtype: name == "AdamW" or (dtype is torch.float32 and name in EACH_WAY),
    ),
    ids=str,
)
def test_rows_are_the_launches_of_the_plan(name: str, dtype: torch.dtype) -> None:
    optimizer = build(name, with_grads(dtype), {**STATEFUL[name], **TRITON})
    rows, total = explained(optimizer)
    optimizer.step()
    (plan,) = bucket_plans(optimizer)
    assert rows["class"].iloc[0] == "begin"
    assert rows["launches"].tolist() == [1] * (1 + len(plan.buckets))
    for bucket, (_, row) in zip(plan.buckets, rows.iloc[1:].iterrows(), strict=True):
        shape, accesses = bucket.shape, 3 + 2 * STATES.get(name, 2) + 2 * bucket.shape.split
        assert row["tile"] == f"{shape.rows} x {shape.columns} x {shape.chunks}"
        assert row["num_warps"] == shape.num_warps
        assert row["tensors"] == len(bucket.tensors)
        assert (row["units"], row["elements"]) == (bucket.units, bucket.elements)
        assert row["bytes"] == bucket.elements * accesses * dtype.itemsize
        assert ("split" in row["class"]) == shape.split
        assert (row["backend"], row["dtype"]) == ("triton", str(dtype).removeprefix("torch."))
    assert total["elements"] == sum(p.numel() for p in optimizer.param_groups[0]["params"])


def test_each_dtype_and_set_of_flags_has_launches_of_its_own() -> None:
    groups = [
        {"params": with_grads()[:2]},
        {"params": with_grads()[:1], "amsgrad": True},
        {"params": with_grads(torch.float64)[:1]},
    ]
    optimizer = build("AdamW", groups, TRITON)
    rows, _ = explained(optimizer)
    optimizer.step()
    expected = []
    for plan, dtype in zip(bucket_plans(optimizer), ("float32", "float32", "float64"), strict=True):
        tiles = [f"{b.shape.rows} x {b.shape.columns} x {b.shape.chunks}" for b in plan.buckets]
        expected += [(dtype, tile) for tile in ("", *tiles)]
    assert list(zip(rows["dtype"], rows["tile"], strict=True)) == expected


CLASSES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], Kwargs]] = {
    "rows": ((3, 20), Tensor.contiguous, {}),
    "registers": ((2, 700), Tensor.contiguous, {}),
    "split": ((2, 20_484), Tensor.contiguous, {}),
    "rows unaligned": ((3, 21), Tensor.contiguous, {}),
    "registers unaligned": ((2, 700), unaligned, {}),
    "rows strided": ((3, 4, 2), Tensor.contiguous, {"unit_dim": 1}),
    "registers strided": ((2, 350, 2), lambda t: in_order(t, (1, 0, 2)), {}),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_say_how_units_are_read(kind: str) -> None:
    shape, lay_out, options = CLASSES[kind]
    param = lay_out(KERNELS.weight(shape))
    rows, _ = explained(build("SGD", [param], {**TRITON, **options}))
    assert rows["class"].tolist() == ["begin", kind]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_elements_count_once_on_both_paths(dtype: torch.dtype) -> None:
    param = torch.zeros(3, 10, dtype=dtype, device=DEVICE)
    for backend in ("triton", "torch"):
        options: dict[str, Any] = {"momentum": 0.9, "backend": backend}
        rows, total = explained(build("SGD", [param], options))
        assert rows["dtype"].iloc[-1] == str(dtype).removeprefix("torch.")
        # p, g and momentum are read, p and momentum written.
        expected = [3, 30, 5 * 30 * dtype.itemsize]
        assert total[["units", "elements", "bytes"]].tolist() == expected


def test_the_torch_path_is_explained_by_its_reason() -> None:
    first, second = torch.zeros(4, 3), torch.zeros(0, 3)
    groups: list[dict[str, Any]] = [
        {"params": [first, second]},
        {"params": [torch.zeros(5, 1, 1), torch.zeros(2, 6)], "foreach": True, "unit_dim": 1},
    ]
    rows, total = explained(SGD_AGC(groups, momentum=0.9))
    assert rows["backend"].tolist() == ["torch"] * 3
    assert rows["why"].tolist() == [
        "it is on cpu, and Triton needs a GPU",
        "it is empty",
        "foreach=True",
    ]
    assert rows["tensors"].tolist() == [1, 1, 2]
    assert rows["units"].tolist() == [4, 0, 1 + 6]
    assert rows["elements"].tolist() == [12, 0, 5 + 12]
    # p, g and momentum are read, p and momentum written.
    assert rows["bytes"].tolist() == [5 * 4 * 12, 0, 5 * 4 * 17]
    assert total["launches"] == 0


def test_the_floor_follows_the_bandwidth() -> None:
    optimizer = SGD_AGC([torch.zeros(1000, 100)], backend="torch")
    rows, total = explained(optimizer, bandwidth=1e9)
    assert rows["why"].tolist() == ["torch"]
    assert total["floor_ms"] == pytest.approx(1.2)
    assert optimizer.explain()["floor_ms"].iloc[-1] == pytest.approx(1.2 / 3000)


def test_it_changes_nothing() -> None:
    optimizer: Any = build("AdamW", with_grads(), TRITON)
    optimizer.explain()
    assert not optimizer.state
    assert optimizer._paths.triton.plan is None


def test_without_pandas_an_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        SGD_AGC([torch.zeros(3)]).explain()


# torch warns of it.
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_twice_in_its_group_is_shown_as_it_is_stepped() -> None:
    twice, once, other = KERNELS.weights([(3, 20), (2, 12), (4, 5)])
    groups: list[dict[str, Any]] = [{"params": [twice, once, twice]}, {"params": [other]}]
    optimizer = SGD_AGC(groups, backend="triton")
    rows, _ = explained(optimizer)
    assert rows["why"].tolist() == ["", "", "a parameter is in its group twice"]
    assert rows["tensors"].tolist() == [0, 1, 3]
    # Each time it is there it is read and written.
    assert rows["elements"].tolist() == [0, 20, 60 + 24 + 60]
