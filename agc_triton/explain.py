"""What a step will do, as a table: buckets, tile shapes, bytes, launches; or why torch does it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.parameter import is_lazy

from agc_triton.dispatch import preview
from agc_triton.exchange import sharding_of
from agc_triton.extras import needed
from agc_triton.routing import reasons
from agc_triton.rule import Work
from agc_triton.units import count_units, has_units

if TYPE_CHECKING:
    from pandas import DataFrame

    from agc_triton.dispatch import Bucket, Preview

COLUMNS = [
    *("backend", "why", "device", "dtype", "class", "tensors", "units", "elements", "tile"),
    *("num_warps", "bytes", "launches", "floor_ms"),
]


def explain(work: Work, bandwidth: float) -> DataFrame:
    """The table behind `AGCOptimizer.explain`: every parameter, with or without a gradient.

    Raises:
        ImportError: pandas is not installed.
    """
    pd = needed("pandas", "explain() makes a pandas.DataFrame")
    taken: list[list[Tensor]] = []
    others: defaultdict[tuple[str, str, str], list[tuple[Tensor, int, int]]] = defaultdict(list)
    for index, group in enumerate(work.groups):
        states = len(work.rule.kernel.states(group))
        taken.append([])
        for p, reason in zip(group["params"], reasons(work, index), strict=True):
            if is_lazy(p):
                continue
            if reason is None:
                taken[-1].append(p)
            else:
                others[(*_kind(p.device, p.dtype), reason)].append((p, states, _units(p, group)))
    rows = []
    for launched in preview(work, taken):
        kind = _kind(launched.device, launched.dtype)
        rows.append(_row("triton", "", *kind, "begin", launches=1))
        if launched.folds:
            rows.append(_row("triton", "", *kind, "fold", units=launched.folds, launches=1))
        for bucket in launched.buckets:
            described = _describe(bucket, launched)
            rows.append(_row("triton", "", *kind, **described))
    exchange = sharding_of(work).exchange
    for pool, group, start, stop in exchange.collectives if exchange else ():
        moved = pool.own[start:stop].nbytes
        over = f"adds up over {torch.distributed.get_world_size(group)} ranks"
        kind = _kind(pool.own.device, pool.own.dtype)
        rows.append(
            _row("torch.distributed", over, *kind, "all-reduce", units=stop - start, bytes=moved)
        )
    for (device, dtype, reason), members in others.items():
        moved = sum(_bytes(p, states) for p, states, _ in members)
        sizes = {
            "tensors": len(members),
            "units": sum(units for _, _, units in members),
            "elements": sum(p.numel() for p, _, _ in members),
            "bytes": moved,
        }
        rows.append(_row("torch", reason, device, dtype, "torch", **sizes))
    table = pd.DataFrame(rows, columns=COLUMNS)
    total = {key: table[key].sum() for key in ("tensors", "units", "elements", "bytes", "launches")}
    table.loc[len(table)] = _row("", "", "", "", "total", **total)
    table["floor_ms"] = table["bytes"] / bandwidth * 1e3
    made: DataFrame = table
    return made


def _kind(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    return str(device), str(dtype).removeprefix("torch.")


def _bytes(param: Tensor, states: int) -> int:
    """What torch moves: as the kernels for whole units."""
    grad = param if param.grad is None else param.grad
    itemsizes = param.element_size() * (2 + 2 * states) + grad.element_size()
    return param.numel() * itemsizes


def _units(param: Tensor, group: Mapping[str, Any]) -> int:
    """How many units a parameter has; 1 where its ``unit_dim`` means nothing."""
    if not has_units(param.shape, group["unit_dim"]):
        return 1
    return count_units(param.shape, group["unit_dim"])


def _describe(bucket: Bucket, launched: Preview) -> dict[str, Any]:
    shape, dtype = bucket.shape, launched.dtype
    itemsize, grad_itemsize = dtype.to_real().itemsize, launched.grad.to_real().itemsize
    kind = "split" if shape.split else "registers" if shape.rows == 1 else "rows"
    kind += " shared" if shape.across else ""
    promises = " strided" if shape.strided else "" if shape.vector > 1 else " unaligned"
    return {
        "kind": kind + promises,
        "tensors": len(bucket.tensors),
        "units": bucket.units,
        "elements": bucket.elements * itemsize // dtype.itemsize,  # a complex one is two there
        "tile": f"{shape.rows} x {shape.columns} x {shape.chunks}",
        "num_warps": shape.num_warps,
        "bytes": bucket.bytes_moved(itemsize, grad_itemsize, launched.states),
        "launches": 1,
    }


def _row(
    backend: str, why: str, device: str, dtype: str, kind: str, **given: Any
) -> dict[str, Any]:
    zeros = dict.fromkeys(("tensors", "units", "elements", "num_warps", "bytes", "launches"), 0)
    start = {"backend": backend, "why": why, "device": device, "dtype": dtype, "class": kind}
    return {**start, **zeros, "tile": "", "floor_ms": 0.0, **given}
