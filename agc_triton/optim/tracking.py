"""What every AGC optimizer tells of its clip: which steps are tracked, and what they have shown."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from agc_triton.tracking import Recorder

if TYPE_CHECKING:
    from pandas import DataFrame


class ClipTracking:
    """Methods of an optimizer that has ``param_groups`` and a `Recorder`.

    The ratio of a unit is ||g|| / max(||w||, agc_eps), of its unscaled gradient and of its weight
    before the step; the unit is clipped where that is over ``clipping`` (Brock et al. 2021,
    equation 3).
    """

    param_groups: Any

    @property
    def _recorder(self) -> Recorder:
        raise NotImplementedError

    def track_clipping(self, every: int = 1, *, warn: bool = True) -> None:
        """Keep the ratios of all units in the next step and every n-th after it, on the device.

        No step waits for that. Units of groups with ``clipping=0`` are tracked as well; a step that
        GradScaler skips, and a parameter without a gradient, leave what there was. A step that a
        CUDA graph captures is tracked, and so are its replays. Where tracking begins or ends, the
        next step plans anew.

        Args:
            every: steps from one that is tracked to the next; 0 stops tracking.
            warn: whether to warn once, where over 90% of the units were clipped in each of the
                first ten tracked steps, or none in the first 1,000.

        Raises:
            TypeError, ValueError: ``every`` is no number of steps.
        """
        self._recorder.track(every, warn)

    def clip_stats(self, gather: bool = False) -> DataFrame:
        """What the clip did in the latest tracked step, by parameter; waits for the device.

        Args:
            gather: whether to take in the units of sharded parameters (DTensor) on other ranks, all
                of which have to call this then; else they are those of this rank.

        Returns:
            a row per parameter, and a last one named "total" of all whose group clips. Columns:
            name ("" where the groups have none), group, shape, units, clipping, clipped (share of
            the units), ratio_5, ratio_50, ratio_95, ratio_max (quantiles over the units), removed
            (share of the gradient's norm, by the weights as they are now), step (how many this
            object had made; 0 and NaN where nothing has been recorded).

        Raises:
            RuntimeError: nothing has been tracked.
            ImportError: pandas is not installed.
        """
        self._check_tracked()
        table: DataFrame = _stats().table_of(self._rows(gather))
        return table

    def clip_log(self, gather: bool = False) -> dict[str, float]:
        """Five numbers of the latest tracked step for a logger; waits for the device.

        They are the total of `clip_stats`: clipped, ratio_50, ratio_95, ratio_max, removed. NaN
        where nothing has been recorded yet.

        Raises:
            RuntimeError: nothing has been tracked.
        """
        self._check_tracked()
        numbers = _stats().total(self._rows(gather))
        return {key: numbers[key] for key in _stats().LOGGED}

    def clip_histograms(self, writer: Any, global_step: int | None = None) -> None:
        """Histograms of log10 of the ratios, one per parameter; waits for the device.

        Args:
            writer: a torch.utils.tensorboard.SummaryWriter, or what has its ``add_histogram``.
            global_step: as there.

        Raises:
            RuntimeError: nothing has been tracked.
        """
        self._check_tracked()
        for name, values in _stats().histograms(self.param_groups, self._recorder.records):
            writer.add_histogram(f"agc log10 ratio/{name}", values, global_step)

    def _rows(self, gather: bool) -> Any:
        return _stats().rows_of(self.param_groups, self._recorder.records, gather)

    def _check_tracked(self) -> None:
        if not self._recorder.ever:
            raise RuntimeError(
                "nothing has been tracked: call track_clipping() before the steps, or construct"
                " the optimizer with track_clipping=1"
            )


def _stats() -> ModuleType:
    # It needs numpy, which takes longer to import than all of this package.
    from agc_triton import clip_stats

    return clip_stats
