"""What ratios say of a threshold, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from agc_triton.choosing.layers import Layer
from agc_triton.extras import needed

if TYPE_CHECKING:
    from pandas import DataFrame


def table_of(layers: Sequence[Layer], target: float) -> DataFrame:
    """A row per parameter, per group and for all that are clipped: see `suggest_clipping`.

    Where no group is clipped the last row is of all.
    """
    pd = needed("pandas", "suggest_clipping() makes a pandas.DataFrame")
    rows = [_row("parameter", layer.name, [layer], target) for layer in layers]
    for index in sorted({layer.group for layer in layers}):
        members = [layer for layer in layers if layer.group == index]
        rows.append(_row("group", f"group {index}", members, target))
    clipped = [layer for layer in layers if layer.clipping]
    rows.append(_row("total", "total", clipped or layers, target))
    table: DataFrame = pd.DataFrame(rows)
    return table


def _row(level: str, name: str, layers: Sequence[Layer], target: float) -> dict[str, Any]:
    from agc_triton.clip_stats import QUANTILES  # with numpy, which takes long to import

    pd = needed("pandas", "suggest_clipping() makes a pandas.DataFrame")
    groups = {layer.group for layer in layers}
    present = {layer.clipping for layer in layers}
    ratios = [ratios for layer in layers for ratios in layer.ratios]
    over = [r > (layer.clipping or math.inf) for layer in layers for r in layer.ratios]
    all_ratios = pd.Series(torch.cat(ratios).numpy() if ratios else [], dtype="float64")
    suggested = all_ratios.quantile(1 - target)
    return {
        "level": level,
        "name": name,
        "group": groups.pop() if len(groups) == 1 else -1,
        "shape": tuple(layers[0].param.shape) if level == "parameter" else (),
        "units": sum(layer.units for layer in layers),
        "batches": max(len(layer.ratios) for layer in layers),
        "clipping": present.pop() if len(present) == 1 else math.nan,
        "clipped": torch.cat(over).double().mean().item() if over else math.nan,
        **{key: all_ratios.quantile(share) for key, share in QUANTILES.items()},
        "suggested": suggested if suggested > 0 else math.nan,
    }
