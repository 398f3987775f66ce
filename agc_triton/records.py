"""What is kept of each unit on its device: how often it was left alone, and its latest ratio.

The ratio of a unit is ||g|| / max(||w||, agc_eps), of its unscaled gradient before clipping; where
that is over ``clipping`` the unit is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from agc_triton.sharded import axes_here, local
from agc_triton.units import UnitDim, memory_order, unit_axes


class UnitOrder(NamedTuple):
    """How the units of a parameter follow each other in a record.

    ``sizes`` are those of the dimensions that index its units, slowest first, and ``order`` says
    which of these dimensions comes where. They are the units of what lies on this rank, or of the
    ``whole`` DTensor.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    whole: bool = False

    @property
    def units(self) -> int:
        """How many there are."""
        return math.prod(self.sizes)

    @classmethod
    def of_memory(cls, param: Tensor, unit_dim: UnitDim) -> UnitOrder:
        """As they lie in memory, those of a dense tensor or of what of it lies on this rank."""
        parts = dict(axes_here(param, unit_dim))
        lies = memory_order(local(param))
        assert lies is not None
        dims = [dim for dim in lies if dim in parts]
        return cls(tuple(parts[dim] for dim in dims), tuple(sorted(dims).index(d) for d in dims))

    @classmethod
    def of_norms(cls, param: Tensor, unit_dim: UnitDim, whole: bool = False) -> UnitOrder:
        """As in `norms.unit_norms`."""
        axes = unit_axes(param.shape, unit_dim) if whole else axes_here(param, unit_dim)
        return cls(tuple(parts for _, parts in axes), tuple(range(len(axes))), whole)

    def as_norms(self, values: Tensor) -> Tensor:
        """Values that follow each other so, in the order of norms."""
        by_dim = sorted(range(len(self.order)), key=self.order.__getitem__)
        return values.reshape(self.sizes).permute(by_dim).reshape(-1)


class Units:
    """The records of some units that follow each other, on one device.

    With ``rows`` those of a gradient that has just these of them; others have no ratio then.
    """

    def __init__(self, skips: Tensor, ratios: Tensor, rows: Tensor | None = None) -> None:
        self._skips, self._ratios, self._rows = skips, ratios, rows

    def __getitem__(self, at: slice) -> Units:
        return Units(self._skips[at], self._ratios[at])

    def of_rows(self, rows: Tensor) -> Units:
        """Those of a row-sparse gradient, if the rows are units at all."""
        return Units(self._skips, self._ratios, rows) if len(self._ratios) > 1 else self

    def skip(self, g_norms: Tensor) -> Tensor:
        """Which of these to leave alone, shaped as the norms; they are counted.

        As in the kernels it is the sum of squares that has to be finite.
        """
        bad = ~torch.isfinite(g_norms.detach() * g_norms.detach())
        self._skips.add_(_all_of(bad).reshape(-1))
        return bad

    def track(self, p_norms: Tensor, g_norms: Tensor, agc_eps: float) -> None:
        """Keep their ratios."""
        ratios = g_norms.detach() / p_norms.detach().clamp(min=agc_eps)
        own = _all_of(ratios).reshape(-1)
        if self._rows is None:
            self._ratios.copy_(own)
        else:
            self._ratios.fill_(math.nan)[self._rows] = own.to(self._ratios.dtype)


class Page:
    """Records of the units of several parameters on one device, one parameter after the other.

    ``skips`` (units, int32) counts how often each was left alone, ``ratios`` (units, fp32) are
    those of the latest tracked step, NaN before there is one, and ``numbers`` (parameters, int32)
    the numbers of these steps, 0 before. ``captured`` if a CUDA graph goes on to write here.
    """

    def __init__(self, device: torch.device, members: Sequence[UnitOrder]) -> None:
        self.device, self.members, self.captured = device, list(members), False
        self.firsts = [0]
        for member in members:
            self.firsts.append(self.firsts[-1] + member.units)
        units = self.firsts[-1]
        with torch.inference_mode(False):
            self.skips = torch.zeros(units, dtype=torch.int32, device=device)
            self.ratios = torch.full((units,), math.nan, dtype=torch.float32, device=device)
            self.numbers = torch.zeros(len(members), dtype=torch.int32, device=device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is written to."""
        return self.skips, self.ratios, self.numbers

    def units(self, position: int | None = None) -> Units:
        """The records of one member, or of all."""
        units = Units(self.skips, self.ratios)
        return units if position is None else units[self.at(position)]

    def at(self, position: int) -> slice:
        """Where the units of a member are."""
        return slice(self.firsts[position], self.firsts[position + 1])

    def take_over(self, position: int, other: Page, place: int) -> None:
        """What another page has of a member; it begins again there."""
        new, old = self.at(position), other.at(place)
        skips = other.skips[old].to(self.device)
        if self.members[position].units == other.members[place].units:
            self.skips[new].add_(skips)
            self.ratios[new].copy_(other.ratios[old])
            self.numbers[position].copy_(other.numbers[place])
        else:
            self.skips[new][:1].add_(skips.sum())
        other.skips[old].zero_()


class UnitRecords:
    """The records of an optimizer's parameters, wherever they are updated; keeps none alive."""

    def __init__(self) -> None:
        # Page and position; the last are written to by the plans, those before by captured graphs.
        self._places: MutableMapping[Tensor, list[tuple[Page, int]]] = WeakIdKeyDictionary()

    def page(self, device: torch.device, members: Sequence[tuple[Tensor, UnitOrder]]) -> Page:
        """Where a plan keeps records of these parameters; what there was of them goes on there."""
        before = [self._places.get(param, []) for param, _ in members]
        orders = [order for _, order in members]
        if members and before[0]:
            page = before[0][-1][0]
            there = [old[-1] if old else None for old in before]
            same = there == [(page, i) for i in range(len(orders))]
            if same and page.device == device and page.members == orders:
                return page
        page = Page(device, orders)
        for i, ((param, _), old) in enumerate(zip(members, before, strict=True)):
            if old:
                page.take_over(i, *old[-1])
            self._places[param] = [place for place in old if place[0].captured] + [(page, i)]
        return page

    def place(self, param: Tensor) -> tuple[Page, int] | None:
        """Where steps record a parameter, and which member of that page it is."""
        places = self._places.get(param)
        return places[-1] if places else None

    def pages(self) -> list[Page]:
        """All that there are."""
        found = {id(page): page for places in self._places.values() for page, _ in places}
        return list(found.values())

    def skipped(self) -> int:
        """How often units were left alone; waits for the devices."""
        return sum(int(page.skips.sum()) for page in self.pages())

    def latest(self, params: Sequence[Tensor]) -> Iterator[Latest | None]:
        """Of each parameter what was recorded last; waits for the devices once."""
        read = {id(page): (page.ratios.cpu(), page.numbers.tolist()) for page in self.pages()}
        for param in params:
            found: Latest | None = None
            for page, i in self._places.get(param, ()):
                ratios, numbers = read[id(page)]
                # One that a graph still writes to comes before what took over from it.
                if numbers[i] > (found.number if found else 0):
                    order = page.members[i]
                    own = order.as_norms(ratios[page.at(i)])
                    found = Latest(own, numbers[i], order.whole)
            yield found


class Latest(NamedTuple):
    """Ratios of a parameter's units in the order of norms (fp32, CPU), and the step's number.

    ``whole`` as of `UnitOrder`.
    """

    ratios: Tensor
    number: int
    whole: bool


class Recording(NamedTuple):
    """What a step records: skipped units, and where ``number`` is given, ratios as that step's.

    ``tracking`` says that some steps do, and so that plans need room for it.
    """

    records: UnitRecords
    skip: bool = False
    tracking: bool = False
    number: int | None = None

    @property
    def of_plans(self) -> UnitRecords | None:
        """Where plans find room, if this or another step records anything."""
        return self.records if self.skip or self.tracking else None


def _all_of(value: Tensor) -> Tensor:
    """A DTensor's value over all ranks; any other tensor as it is."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
