"""Launches of one fused step: arguments are bound once, a step only fires them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from agc_triton.exchange import Pool
from agc_triton.kernels import abi
from agc_triton.kernels.begin import begin
from agc_triton.kernels.fold import fold
from agc_triton.kernels.step import step
from agc_triton.records import Page
from agc_triton.routing import interpreted
from agc_triton.triton_path import compiling
from agc_triton.triton_path.buckets import BucketPlan
from agc_triton.triton_path.compiling import Kernel, Target
from agc_triton.triton_path.tables import Tables


class Launch:
    """One kernel and those of its arguments that stay, which follow the others.

    It is compiled and loaded ahead of its first start, and started without the JIT.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        bound: tuple[Any, ...],
        constexprs: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.kernel, self.grid, self.options = kernel, (programs, 1, 1), options
        self.bound = (*bound, *constexprs.values())
        self._start: Any = None

    def load(self, *varying: Any) -> None:
        """Compile and load it for arguments like these; nothing runs.

        Raises:
            RuntimeError: it cannot be compiled or loaded.
        """
        try:
            if interpreted():
                self._start = self.kernel[self.grid]
            else:
                given = (*varying, *self.bound)
                compiled = self.kernel.warmup(*given, grid=self.grid, **self.options)
                self._start = compiled[self.grid]
        except Exception as error:  # whatever the compiler, its tools or the driver raise
            raise self._failed(error, "nothing has been updated: use backend='torch'") from error

    def fire(self, *varying: Any) -> None:
        """Start it on the current stream.

        Raises:
            RuntimeError: it cannot be started.
        """
        try:
            self._start(*varying, *self.bound)
        except Exception as error:  # whatever the driver raises
            remedy = (
                "weights, states and step counts may be updated in part: go on from a checkpoint,"
                " or with backend='torch'"
            )
            raise self._failed(error, remedy) from error

    def _failed(self, error: Exception, remedy: str) -> RuntimeError:
        return RuntimeError(
            f"the kernel {self.kernel.__name__!r} ({self.grid[0]} programs, {self.options})"
            f" failed with {type(error).__name__}: {error}; {remedy}"
        )


class PlacedRecords(NamedTuple):
    """Where the records of a launch group's units are, and what is recorded in its steps.

    ``track`` says that some of them keep the ratios.
    """

    page: Page
    skip: bool
    track: bool


class Variant(NamedTuple):
    """The launches of a step: what opens it, and `step` for what is whole here or shared."""

    opening: Launch
    steps: list[Launch]
    steps_across: list[Launch]


class StepLauncher:
    """The launches of one step over a plan: `begin`, `fold`, then `step` once per bucket.

    Args:
        plan: the launches and their tiles.
        kernel: what they are compiled for.
        device: where tables, parameters, gradients and states lie.
        sums: a pair of partial sums, of p and g, for each part of `plan`.
        records: where something is kept of each unit; None if nothing is.
        pool: where units that are split between ranks are added up; None where there are none.
    """

    def __init__(
        self,
        plan: BucketPlan,
        kernel: Kernel,
        device: torch.device,
        sums: Tensor,
        records: PlacedRecords | None,
        pool: Pool | None,
    ) -> None:
        self._plan, self._kernel, self._target = plan, kernel, Target.of(device)
        tables = (plan.fields, plan.parts, plan.folds, *(bucket.tiles for bucket in plan.buckets))
        fields, parts, folds, *tiles = (torch.from_numpy(table).to(device) for table in tables)
        row = abi.OF_RULE + kernel.rule.prepared
        prepared = torch.empty(len(plan.fields) * row, dtype=torch.float64, device=device)
        # Stand for a grad_scale or found_inf that is not given: one `begin` serves all steps.
        self._no_scale = torch.ones((), dtype=torch.float32, device=device)
        self._no_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.tensors = [fields, parts, folds, *tiles, prepared, self._no_scale, self._no_inf]
        self._sums, self._pool, self._records = sums, pool, records
        self.untracked = self._variant(track=False)
        self.tracked = self._variant(track=True) if records and records.track else None
        # Of units that are split between ranks; these wait for what the ranks add up.
        self.folding: list[Launch] = []
        if pool is not None and len(plan.folds):
            bound, constexprs = (sums, folds, pool.own), compiling.fold_constexprs()
            options = self._target.options(compiling.FOLD_WARPS, pdl=False)
            self.folding.append(Launch(fold, len(folds), bound, constexprs, options))

    def _variant(self, track: bool) -> Variant:
        """All launches of steps that keep ratios, or of those that do not."""
        plan, sums, pool = self._plan, self._sums, self._pool
        fields, parts, _, *tiles, prepared, _, _ = self.tensors
        n, skip = len(plan.fields), self._records is not None and self._records.skip
        # Pointers of their types, which are not read where nothing is recorded.
        page = self._records.page if self._records else Page(fields.device, ())
        preparing = -(-n // compiling.PREPARE_BLOCK)
        of_ranks = sums if pool is None else pool.own
        opening = Launch(
            begin,
            preparing + len(plan.parts),
            (fields, prepared, parts, sums, of_ranks, page.numbers, n, preparing),
            compiling.begin_constexprs(plan, self._kernel, track),
            self._target.options(compiling.BEGIN_WARPS, pdl=False),
        )
        whole = [bucket for bucket in plan.buckets if not bucket.shape.across]
        variant = Variant(opening, [], [])
        for bucket, own in zip(plan.buckets, tiles, strict=True):
            if across := bucket.shape.across:
                assert pool is not None
                total, on, place = pool.total, self._target._replace(pdl=False), (True, True)
            else:
                total, on = sums, self._target
                place = bucket is whole[0], bucket is whole[-1]
            launch = Launch(
                step,
                len(bucket.tiles),
                (own, fields, prepared, total, page.skips, page.ratios, n),
                compiling.step_constexprs(bucket.shape, self._kernel, on, skip, track, *place),
                on.options(bucket.shape.num_warps, on.pdl),
            )
            (variant.steps_across if across else variant.steps).append(launch)
        return variant

    def load(self, tables: Tables) -> None:
        """Compile and load all kernels, which a CUDA graph's capture would not allow.

        Raises:
            RuntimeError: a kernel cannot be.
        """
        for variant in filter(None, (self.untracked, self.tracked)):
            variant.opening.load(*self._varying(tables, None, None, 0))
            for launch in variant.steps + variant.steps_across:
                launch.load(tables.addresses)
        for launch in self.folding:
            launch.load()

    def _of(self, tracked: bool) -> Variant:
        """The launches of a step."""
        if not tracked:
            return self.untracked
        assert self.tracked is not None
        return self.tracked

    def begin(
        self,
        tables: Tables,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        number: int | None,
    ) -> None:
        """Count, prepare and sum; both tensors are fp32 on the device."""
        opening = self._of(number is not None).opening
        opening.fire(*self._varying(tables, grad_scale, found_inf, number or 0))
        for launch in self.folding:
            launch.fire()

    def update(self, tables: Tables, tracked: bool) -> None:
        """Clip and update the units that are whole here."""
        for launch in self._of(tracked).steps:
            launch.fire(tables.addresses)

    def update_across(self, tables: Tables, tracked: bool) -> None:
        """The same for those that are split between ranks, whose totals are there."""
        for launch in self._of(tracked).steps_across:
            launch.fire(tables.addresses)

    def _varying(
        self, tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None, number: int
    ) -> tuple[Tensor | int, ...]:
        scale = self._no_scale if grad_scale is None else grad_scale
        inf = self._no_inf if found_inf is None else found_inf
        return scale, inf, tables.addresses, tables.values, tables.pointers, number
