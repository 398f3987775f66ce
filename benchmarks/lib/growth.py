"""Whether a cost grows faster than linearly with a count."""

from __future__ import annotations

import math

import pandas as pd

# Times the cost of each of a smaller case, up to which growth is called linear.
LINEAR = 1.15


def over_cheapest_smaller(each: pd.Series[float]) -> pd.Series[float]:
    """The cost of each, over the least that each costs in any row before."""
    return each / each.cummin().shift()


def of_each_more(cost: pd.Series[float], counts: pd.Series[int]) -> pd.Series[float]:
    """The most that each adds to the cost of the fewest; a rise up to `LINEAR` may be noise."""
    fewest = cost.iloc[0]
    rise = cost.clip(lower=LINEAR * fewest) - fewest
    return (rise / (counts - counts.iloc[0])).replace(math.inf, math.nan)


def verdict(ratios: pd.Series[float], counts: pd.Series[int]) -> str:
    """Where each costs more than where there are fewer, in words."""
    if beyond := listed(ratios, counts):
        return f"over {LINEAR:g} times what fewer cost each: {beyond}"
    return "grows no faster than linearly"


def listed(ratios: pd.Series[float], counts: pd.Series[int]) -> str:
    """The ratios over `LINEAR` and where they are."""
    pairs = zip(ratios, counts, strict=True)
    return ", ".join(f"{ratio:.2f} times at {count:,}" for ratio, count in pairs if ratio > LINEAR)
