"""The rows that benchmarks write: their columns, and what follows from single steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

COLUMNS = [
    *("model", "parameters", "tensors", "units", "optimizer", "options"),
    *("implementation", "version", "role"),
    *("device", "threads", "dtype", "rounds", "sets"),
    *("device_ms", "p20_ms", "p80_ms", "host_ms", "alone_ms", "head_start_ms"),
    *("bytes_moved", "gb_per_s", "share_of_copy_bandwidth"),
    *("ratio_to_unclipped", "ratio_to_best_peer", "launches"),
    *("peak_extra_bytes", "peak_extra_share", "kept_extra_bytes", "share_of_units_clipped"),
    *("torch", "triton", "timestamp"),
]


def summarize(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per implementation from one per step, with ``COLUMNS``."""
    by_name = steps.groupby("implementation", sort=False)
    rows = steps.drop_duplicates("implementation", keep="last").set_index("implementation")
    rows = rows.assign(
        **quantiles(by_name["device_ms"], "device_ms", "ms"),
        **{name: by_name[name].median() for name in ("host_ms", "alone_ms", "head_start_ms")},
        rounds=by_name.size(),
    )
    return _with_ratios(rows.reset_index())


def quantiles(values: Any, median: str, unit: str) -> dict[str, Any]:
    """Columns for the median, 20th and 80th percentile of a series, or of each group of one."""
    shares = {median: 0.5, f"p20_{unit}": 0.2, f"p80_{unit}": 0.8}
    return {name: values.quantile(share) for name, share in shares.items()}


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV that is whole at any moment."""
    unfinished = path.with_suffix(".unfinished")
    table.to_csv(unfinished, index=False)
    os.replace(unfinished, path)


def _with_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Bandwidth, and step times beside those of other roles; the fastest of each role counts."""
    best, nan = rows.groupby("role")["device_ms"].min(), float("nan")
    rows["gb_per_s"] = rows["bytes_moved"] / rows["device_ms"] / 1e6
    rows["share_of_copy_bandwidth"] = best.get("copy", nan) / rows["device_ms"]
    rows["ratio_to_unclipped"] = rows["device_ms"] / best.get("unclipped", nan)
    rows["ratio_to_best_peer"] = best.get("peer", nan) / rows["device_ms"]
    rows = rows.astype({"launches": "Int64", "kept_extra_bytes": "Int64"})
    return rows[COLUMNS]
