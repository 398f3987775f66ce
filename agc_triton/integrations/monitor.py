"""ClipMonitor, and finding the optimizers that clip inside what frameworks make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from agc_triton.optim import AGC
from agc_triton.optim.optimizer import AGCOptimizer


def clipping_optimizer(optimizer: Any) -> AGC | AGCOptimizer | None:
    """The optimizer of this package that is there or inside another, such as Accelerate's.

    The innermost, as Lightning's wrapper is of the class that it wraps and copies its attributes.
    """
    for held in vars(optimizer).values():
        if isinstance(held, Optimizer) and (found := clipping_optimizer(held)) is not None:
            return found
    return optimizer if isinstance(optimizer, (AGC, AGCOptimizer)) else None


def clipping_optimizers(optimizers: Iterable[Any], whose: str) -> list[AGC | AGCOptimizer]:
    """Those that clip; ``whose`` they are begins the message.

    Raises:
        TypeError: none does.
    """
    given = list(optimizers)
    found = [own for own in map(clipping_optimizer, given) if own is not None]
    if not found:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in given) or "none"
        raise TypeError(
            f"{whose} optimizers ({kinds}) do not clip; use one of agc_triton (SGD_AGC, AdamW_AGC,"
            " ...) or wrap yours: agc_triton.AGC(optimizer)"
        )
    return found


def numbers_of(optimizers: Sequence[AGC | AGCOptimizer]) -> dict[str, float]:
    """`clip_log` of each under "agc/", "agc/0/", "agc/1/", ... where there are several.

    Numbers of which nothing has been recorded yet are left out. It waits for the device.
    """
    numbers = {}
    for i, optimizer in enumerate(optimizers):
        prefix = "agc" if len(optimizers) == 1 else f"agc/{i}"
        for key, value in optimizer.clip_log().items():
            if not math.isnan(value):
                numbers[f"{prefix}/{key}"] = value
    return numbers


class ClipMonitor:
    """Has every n-th step of an optimizer tracked, and logs what the clip did in it.

    It hangs on the optimizer's steps, so that a loop stays as it is; steps that Accelerate or
    GradScaler leave out do not count. After a tracked step it waits for the device.

    Args:
        optimizer: one of this package, or what Accelerate or another wrapper has made of it.
        log: called after tracked steps with a dict of floats "agc/clipped", "agc/ratio_50",
            "agc/ratio_95", "agc/ratio_max" and "agc/removed" (see `AdamW_AGC.clip_log`): such as
            ``wandb.log``, ``accelerator.log`` or ``print``.
        every: steps from one that is logged to the next.

    Raises:
        TypeError: ``optimizer`` does not clip, or is an AGC around one that calls no step hooks.
        ValueError: ``every`` is no number of steps.
    """

    def __init__(
        self, optimizer: Optimizer, log: Callable[[dict[str, float]], object], every: int = 1
    ) -> None:
        (self.optimizer,) = clipping_optimizers([optimizer], "ClipMonitor's")
        inner: Any = self.optimizer.optimizer if isinstance(self.optimizer, AGC) else self.optimizer
        if not getattr(type(inner).step, "hooked", False):
            raise TypeError(
                f"{type(inner).__name__} calls no step hooks, which ClipMonitor needs; call"
                " optimizer.track_clipping() and, after steps, log optimizer.clip_log()"
            )
        if every < 1:
            raise ValueError(f"every must be 1 step or more, not {every}")
        self.log, self.every = log, every
        self._steps = 0
        self.optimizer.track_clipping(every)
        self._hook = self.optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        if self._steps % self.every == 0 and (numbers := numbers_of([self.optimizer])):
            self.log(numbers)
        self._steps += 1

    def close(self) -> None:
        """Stop logging and tracking."""
        self._hook.remove()
        self.optimizer.track_clipping(0)
