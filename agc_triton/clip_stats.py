"""What the clip does, from the records of tracked steps: a table, five numbers, histograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agc_triton.extras import needed
from agc_triton.norms import norms_over, unit_norms
from agc_triton.records import Latest, UnitRecords
from agc_triton.sharded import axes_here, gathered, is_sharded, local, repeated
from agc_triton.units import UnitDim

if TYPE_CHECKING:
    from pandas import DataFrame

Groups = Sequence[Mapping[str, Any]]

QUANTILES = {"ratio_5": 0.05, "ratio_50": 0.5, "ratio_95": 0.95, "ratio_max": 1.0}
NUMBERS = ("clipped", *QUANTILES, "removed")
LOGGED = ("clipped", "ratio_50", "ratio_95", "ratio_max", "removed")


class Measured(NamedTuple):
    """Units, an entry each: ratio, weight norm (agc_eps at least), limit, whether it counts.

    A unit that ranks share counts on one of them, and its weight norm is of what lies here.
    """

    ratios: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]
    limits: npt.NDArray[np.float64]
    counted: npt.NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Measured]) -> Measured:
        """All units of several."""
        none = np.empty(0)
        own = [cls(none, none, none, none.astype(bool)), *parts]
        return cls(*map(np.concatenate, zip(*own, strict=True)))

    def numbers(self) -> dict[str, float]:
        """Share of units clipped, quantiles of ratios, share of the gradient's norm removed.

        The last goes by the weights as they are now: of earlier ones no record is kept.
        """
        there = ~np.isnan(self.ratios)
        counted = there & self.counted
        if not counted.any():
            return dict.fromkeys(NUMBERS, np.nan)
        ratios, limits = self.ratios[counted], self.limits[counted]
        # Between infinite ones nothing can be interpolated.
        quantiles = np.quantile(ratios, list(QUANTILES.values()), method="inverted_cdf")
        left = np.minimum(self.ratios, self.limits)[there] * self.norms[there]
        whole = self.ratios[there] * self.norms[there]
        norm = float(np.linalg.norm(whole))
        return {
            "clipped": float(np.mean(ratios > limits)),
            **dict(zip(QUANTILES, map(float, quantiles), strict=True)),
            "removed": 1.0 - float(np.linalg.norm(left)) / norm if norm else 0.0,
        }


class Row(NamedTuple):
    """What a parameter is, what was recorded of its units, and in which step (0: in none yet)."""

    name: str
    group: int
    shape: tuple[int, ...]
    clipping: float
    measured: Measured
    step: int


def rows_of(groups: Groups, records: UnitRecords, gather: bool) -> list[Row]:
    """A row per parameter; with ``gather`` of all ranks' units, who have to call it together."""
    members = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
    params = [groups[g]["params"][i] for g, i in members]
    latest = list(records.latest(params))
    norms = _weight_norms(groups, members, latest)
    seen = [
        _measured(param, groups[g], own, last, gather)
        for (g, _), param, own, last in zip(members, params, norms, latest, strict=True)
    ]
    steps = [0 if last is None else last.number for last in latest]
    if gather:
        of_ranks = gathered(params, list(zip(seen, steps, strict=True)))
        seen = [Measured.joined([m for m, _ in own]) for own in of_ranks]
        steps = [max(int(step) for _, step in own) for own in of_ranks]
    rows = []
    for (g, i), param, measured, step in zip(members, params, seen, steps, strict=True):
        names = groups[g].get("param_names")
        what = names[i] if names else "", g, tuple(param.shape), groups[g]["clipping"] or 0.0
        rows.append(Row(*what, measured, step))
    return rows


def total(rows: Sequence[Row]) -> dict[str, float]:
    """`Measured.numbers` of all units that can be clipped; of all units where none can."""
    clipped = [row.measured for row in rows if row.clipping]
    return Measured.joined(clipped or [row.measured for row in rows]).numbers()


def table_of(rows: Sequence[Row]) -> DataFrame:
    """The table behind `clip_stats`.

    Raises:
        ImportError: pandas is not installed.
    """
    pd = needed("pandas", "clip_stats() makes a pandas.DataFrame (clip_log() makes none)")
    lines = []
    for row in rows:
        line: dict[str, Any] = {"name": row.name, "group": row.group, "shape": row.shape}
        line |= {"units": int(row.measured.counted.sum()), "clipping": row.clipping}
        lines.append({**line, **row.measured.numbers(), "step": row.step})
    units = sum(line["units"] for line in lines)
    last = {"name": "total", "group": -1, "shape": (), "units": units, "clipping": np.nan}
    lines.append({**last, **total(rows), "step": max((row.step for row in rows), default=0)})
    columns = ["name", "group", "shape", "units", "clipping", *NUMBERS, "step"]
    table: DataFrame = pd.DataFrame(lines, columns=columns)
    return table


def histograms(groups: Groups, records: UnitRecords) -> Iterator[tuple[str, Tensor]]:
    """Names, and log10 of the ratios of this rank's units but those that are 0 or not finite."""
    for row, i in _numbered(rows_of(groups, records, gather=False)):
        ratios = torch.from_numpy(row.measured.ratios)
        ratios = ratios[(ratios > 0) & ratios.isfinite()]
        if len(ratios):
            yield row.name or f"group {row.group}/parameter {i}", ratios.log10()


def _numbered(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """Each with its position in its group."""
    seen: dict[int, int] = {}
    for row in rows:
        seen[row.group] = seen.get(row.group, -1) + 1
        yield row, seen[row.group]


def _measured(
    param: Tensor, group: Mapping[str, Any], norms: Tensor, last: Latest | None, gather: bool
) -> Measured:
    if last is None:
        return Measured.joined([])
    ratios = last.ratios.to(torch.float64).numpy()
    own = np.maximum(norms.numpy(), group["agc_eps"])
    counted = np.ones(len(ratios), bool)
    if gather:
        shared, same = repeated(param, group["unit_dim"], last.whole)
        if same:
            return Measured.joined([])
        counted = np.full(len(ratios), not shared)
    return Measured(ratios, own, np.full(len(ratios), group["clipping"] or np.inf), counted)


@torch.no_grad()
def _weight_norms(
    groups: Groups, members: Sequence[tuple[int, int]], latest: Sequence[Latest | None]
) -> list[Tensor]:
    """Norms of the units that are recorded, on the CPU in fp64, with one wait per device."""
    of_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    found = [torch.empty(0, dtype=torch.float64, device="cpu")] * len(members)
    for at, ((g, i), last) in enumerate(zip(members, latest, strict=True)):
        if last is not None:
            norms = _norms_here(groups[g]["params"][i], groups[g]["unit_dim"], last.whole)
            of_device.setdefault(norms.device, []).append((at, norms))
    for norms_there in of_device.values():
        sizes = [len(norms) for _, norms in norms_there]
        together = torch.cat([norms.to(torch.float64) for _, norms in norms_there]).cpu()
        for (at, _), norms in zip(norms_there, torch.split(together, sizes), strict=True):
            found[at] = norms
    return found


def _norms_here(param: Tensor, unit_dim: UnitDim, whole: bool) -> Tensor:
    """A norm per unit recorded on this rank, in the order of norms; of what of it lies here."""
    if not is_sharded(param):
        return unit_norms(param, unit_dim).reshape(-1)
    if whole:
        norms: Any = unit_norms(param, unit_dim)
        return norms.full_tensor().reshape(-1)  # type: ignore[no-any-return]  # a DTensor's
    here, axes = local(param), dict(axes_here(param, unit_dim))
    shape: list[int] = []
    dims: list[int] = []
    for dim, size in enumerate(here.shape):
        parts = axes.get(dim, 1)
        shape += [parts, size // parts] if parts else [0, 0]
        dims.append(len(shape) - 1)
    return norms_over(here.reshape(shape), tuple(dims)).reshape(-1)
