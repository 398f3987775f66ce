"""The callback of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from agc_triton.integrations.monitor import clipping_optimizers, numbers_of


class TransformersClipCallback(TrainerCallback):  # type: ignore[misc]  # installed for its tests only
    """Logs what the clip did, as "agc/clipped" and so on, whenever the Trainer logs its loss.

    By ``trainer.log``, so that it is in ``state.log_history`` and wherever ``report_to`` says::

        trainer.add_callback(TransformersClipCallback(trainer))

    Args:
        trainer: whose steps are tracked; its own callbacks are not told which trainer they are of.
        every: steps from one that is tracked to the next; what is logged is the latest.

    Raises:
        TypeError: as training begins, where the optimizer does not clip.
    """

    def __init__(self, trainer: Trainer, every: int = 1) -> None:
        self.trainer, self.every = trainer, every
        self._optimizers: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Track the optimizer that there is now."""
        self._optimizers = clipping_optimizers([given["optimizer"]], "the Trainer's")
        for optimizer in self._optimizers:
            optimizer.track_clipping(self.every)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Log beside the training loss."""
        if logs and "loss" in logs and (numbers := numbers_of(self._optimizers)):
            self.trainer.log(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop tracking."""
        for optimizer in self._optimizers:
            optimizer.track_clipping(0)
