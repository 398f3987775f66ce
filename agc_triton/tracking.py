"""Which steps of an optimizer are tracked, and a warning where ``clipping`` proves to be off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from agc_triton.records import Page, Recording, UnitRecords

# A warning: more than MOST of the units clipped in each of the first ALL_IN tracked steps, or none
# in NONE_IN.
MOST, ALL_IN, NONE_IN = 0.9, 10, 1000

Groups = Sequence[Mapping[str, Any]]


class Recorder:
    """An optimizer's records, and which of its steps are tracked: the next and every n-th."""

    # ``ever`` is whether any step has been chosen.
    def __init__(self) -> None:
        self.records = UnitRecords()
        self.every, self.warn, self.ever = 0, True, False
        self._watch: Watch | None = None
        self._made = self._first = 0

    def track(self, every: int, warn: bool) -> None:
        """Choose steps; 0 stops. With ``warn`` a `Watch` looks at the first of them.

        Raises:
            TypeError, ValueError: ``every`` is no number of steps.
        """
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, of steps, not {type(every).__name__} ({every})")
        if every < 0:
            raise ValueError(f"Invalid every: {every}; it must be 1 step or more, or 0 to stop")
        self.every, self.warn, self._first = every, warn, self._made
        self.ever = self.ever or every > 0
        self._watch = Watch(self.records) if every and warn else None

    def next(self, skip: bool, capturing: bool, chosen: bool | None = None) -> Recording:
        """What the next step records; whether it is tracked can be ``chosen`` by the caller.

        What a CUDA graph captures is replayed, and tracked always.
        """
        if chosen is None:
            at = (self._made - self._first) % self.every if self.every else 1
            chosen = at == 0 or (capturing and self.every > 0)
        return Recording(self.records, skip, self.every > 0, self._made + 1 if chosen else None)

    def step_made(self, recording: Recording, groups: Groups, capturing: bool) -> None:
        """Count a step, and have what it has recorded looked at."""
        self._made += 1
        if self._watch is not None and recording.number is not None and not capturing:
            self._watch.look(groups, recording.number)


class Watch:
    """Looks at tracked steps until it is plain that some units are clipped and not all.

    It never waits: what a device has recorded is copied on its stream and read after a later step.
    """

    def __init__(self, records: UnitRecords) -> None:
        self._records = records
        self._copies: list[HostCopy] = []
        self._number = 0
        # The share of the units that each step clipped.
        self._shares: list[float] = []
        self._over = False

    def look(self, groups: Groups, number: int) -> None:
        """Read what has arrived, and copy what the step of this number has recorded.

        Warns:
            UserWarning: nearly all units were clipped in each of the first steps, or none in many.
        """
        if self._over or not self._read(groups):
            return
        limits: dict[Page, list[float]] = {}
        for group in groups:
            for param in group["params"]:
                if (place := self._records.place(param)) is not None:
                    own = limits.setdefault(place[0], [math.nan] * len(place[0].members))
                    own[place[1]] = group["clipping"] or math.nan
        known = {copy.page: copy for copy in self._copies}
        self._copies = [known.get(page) or HostCopy(page) for page in limits]
        for copy in self._copies:
            copy.start(limits[copy.page])
        self._number = number
        self._read(groups)

    def _read(self, groups: Groups) -> bool:
        """Judge what has arrived; False while something is on its way."""
        if not all(copy.arrived() for copy in self._copies):
            return False
        counts = [copy.counts(self._number) for copy in self._copies]
        self._number = 0  # it is read once
        clipped, known = (sum(each) for each in zip(*counts, strict=True)) if counts else (0, 0)
        if known:  # else the step was skipped
            self._shares.append(clipped / known)
            self._judge(groups)
        return True

    def _judge(self, groups: Groups) -> None:
        seen = len(self._shares)
        if seen == ALL_IN and min(self._shares) > MOST:
            _warn(groups, f"over {MOST:.0%} of the units in each of the first {ALL_IN}")
        elif seen == NONE_IN and not any(self._shares):
            _warn(groups, f"no unit in any of the first {NONE_IN}")
        self._over = seen >= NONE_IN or (seen >= ALL_IN and max(self._shares) > 0.0)


class HostCopy:
    """What a page holds after a step, copied to the host."""

    def __init__(self, page: Page) -> None:
        self.page = page
        pinned = page.device.type == "cuda"
        self._ratios, self._numbers = (
            torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            for tensor in (page.ratios, page.numbers)
        )
        self._units = torch.tensor([member.units for member in page.members], device="cpu")
        self._limits = self._ratios
        # torch has no types for it.
        self._event: Any = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def start(self, limits: list[float]) -> None:
        """Copy without waiting; ``limits`` are the members' ``clipping``, NaN without any."""
        self._limits = torch.tensor(limits, dtype=torch.float32, device="cpu")
        self._ratios.copy_(self.page.ratios, non_blocking=True)
        self._numbers.copy_(self.page.numbers, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self.page.device))

    def arrived(self) -> bool:
        """Whether it is there."""
        return self._event is None or bool(self._event.query())

    def counts(self, number: int) -> tuple[int, int]:
        """How many units the step of this number clipped, and of how many."""
        limits = torch.where(self._numbers == number, self._limits, math.nan)
        limits = limits.repeat_interleave(self._units)
        clipped, under = (self._ratios > limits).sum(), (self._ratios <= limits).sum()
        return int(clipped), int(clipped + under)


def _warn(groups: Groups, what: str) -> None:
    values = sorted({group["clipping"] for group in groups if group["clipping"]})
    warnings.warn(
        f"clipping={', '.join(map(str, values))} clipped {what} tracked steps;"
        " agc_triton.suggest_clipping(model, loss_fn, batches, optimizer) shows which value clips"
        " which share of them, and track_clipping(..., warn=False) turns this warning off",
        stacklevel=2,
    )
