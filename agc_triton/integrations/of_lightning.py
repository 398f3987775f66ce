"""Lightning's callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from agc_triton.integrations.monitor import clipping_optimizers, numbers_of


class LightningClipMonitor(Callback):  # type: ignore[misc]  # installed for its tests only
    """Logs what the clip did, as "agc/clipped" and so on, whenever the Trainer logs.

    All optimizers that clip are tracked; where there are several, names begin with "agc/0/",
    "agc/1/", ... Of sharded parameters it logs what the first rank has.

    Args:
        every: steps from one that is tracked to the next; what is logged is the latest.

    Raises:
        TypeError: as training begins, where no optimizer clips.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self._optimizers: list[Any] = []
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Track the optimizers that there are now."""
        self._optimizers = clipping_optimizers(trainer.optimizers, f"{type(pl_module).__name__}'s")
        self._steps = trainer.global_step
        for optimizer in self._optimizers:
            optimizer.track_clipping(self.every)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log by the module after the batches that Lightning logs, if one has made a step."""
        stepped, self._steps = trainer.global_step > self._steps, trainer.global_step
        # As Lightning's own monitors ask it.
        if stepped and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(numbers_of(self._optimizers))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop tracking."""
        for optimizer in self._optimizers:
            optimizer.track_clipping(0)
