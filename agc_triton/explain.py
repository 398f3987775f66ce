"""What a step will do, as a table: buckets, tile shapes, bytes, launches; or why torch does it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from agc_triton.dispatch import Bucket, buckets_of
from agc_triton.routing import reasons
from agc_triton.rule import Work
from agc_triton.units import has_units, resolve_unit_dim

COLUMNS = [
    *("backend", "why", "device", "dtype", "class", "tensors", "units", "elements", "tile"),
    *("num_warps", "bytes", "launches", "floor_ms"),
]


def explain(work: Work, bandwidth: float) -> pd.DataFrame:
    """The table behind `AGCOptimizer.explain`: every parameter, with or without a gradient."""
    kernel = work.rule.kernel
    fused: defaultdict[tuple[Any, ...], list[tuple[Tensor, int | None, int]]] = defaultdict(list)
    others: defaultdict[tuple[Any, ...], list[tuple[Tensor, int, int]]] = defaultdict(list)
    for index, group in enumerate(work.groups):
        states, flags = len(kernel.states(group)), kernel.flags(group)
        for param, reason in zip(group["params"], reasons(work.backend, group), strict=True):
            if is_lazy(param):
                continue
            kind = (str(param.device), str(param.dtype).removeprefix("torch."))
            if reason is None:
                key = (*kind, param.dtype, states, flags)
                fused[key].append((param, group["unit_dim"], index))
            else:
                known = has_units(param.shape, group["unit_dim"])
                dim = resolve_unit_dim(param.shape, group["unit_dim"]) if known else None
                count = 1 if dim is None else param.shape[dim]
                others[(*kind, reason)].append((param, states, count))
    rows = []
    for (device, dtype, stored, states, _), tensors in fused.items():
        rows.append(_row("triton", "", device, dtype, "begin", launches=1))
        for bucket in buckets_of(tensors, states):
            described = _describe(bucket, stored, states)
            rows.append(_row("triton", "", device, dtype, **described))
    for (device, dtype, reason), members in others.items():
        moved = sum(p.numel() * p.element_size() * (3 + 2 * states) for p, states, _ in members)
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
    return table


def _describe(bucket: Bucket, dtype: torch.dtype, states: int) -> dict[str, Any]:
    shape, itemsize = bucket.shape, dtype.to_real().itemsize
    kind = "split" if shape.split else "registers" if shape.rows == 1 else "rows"
    promises = " strided" if shape.strided else "" if shape.vector > 1 else " unaligned"
    return {
        "kind": kind + promises,
        "tensors": len(bucket.tensors),
        "units": bucket.units,
        "elements": bucket.elements * itemsize // dtype.itemsize,  # a complex one is two there
        "tile": f"{shape.rows} x {shape.columns} x {shape.chunks}",
        "num_warps": shape.num_warps,
        "bytes": bucket.bytes_moved(itemsize, states),
        "launches": 1,
    }


def _row(
    backend: str, why: str, device: str, dtype: str, kind: str, **given: Any
) -> dict[str, Any]:
    zeros = dict.fromkeys(("tensors", "units", "elements", "num_warps", "bytes", "launches"), 0)
    start = {"backend": backend, "why": why, "device": device, "dtype": dtype, "class": kind}
    return {**start, **zeros, "tile": "", "floor_ms": 0.0, **given}
