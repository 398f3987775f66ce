"""Which runs are made: the grids that have names, and how a grid becomes runs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.lib.optimizers import OPTIMIZERS

# At batch 256; the rates beside it are a quarter and four times of it.
OF_GRIDS = {"sgd": 0.4, "adam": 0.004, "adamw": 0.004, "rmsprop": 0.002}
# No grid has the others, for which nothing was tried: torch's defaults.
MIDDLE_LR = {name: OF_GRIDS.get(name, known.default_lr) for name, known in OPTIMIZERS.items()}
STEP = 4.0


class Run(NamedTuple):
    """One training run; ``images`` and ``pixels`` of 0 are as many as there are."""

    data: str
    pixels: int
    images: int
    model: str
    optimizer: str
    clipping: float
    batch: int
    lr: float
    seed: int
    epochs: int
    dtype: str


@dataclass(frozen=True)
class Part:
    """All combinations of some settings, which the grids with names put together."""

    data: tuple[str, ...] = ("digits",)
    models: tuple[str, ...] = ("nf_resnet",)
    optimizers: tuple[str, ...] = ("sgd",)
    clippings: tuple[float, ...] = (0.0, 0.01, 0.04)
    batches: tuple[int, ...] = (64, 256, 1024)
    lrs: tuple[float, ...] = ()
    seeds: int = 3
    epochs: int = 10
    images: int = 0
    pixels: int = 0
    dtype: str = "float32"

    def runs(self) -> Iterator[Run]:
        """Without ``lrs`` they go with the optimizer and the square root of the batch size."""
        axes = (self.data, self.models, self.optimizers, self.batches, range(self.seeds))
        for data, model, optimizer, batch, seed in itertools.product(*axes):
            lrs = self.lrs or default_lrs(optimizer, batch)
            for lr, clipping in itertools.product(lrs, self.clippings):
                yield Run(
                    *(data, self.pixels, self.images, model, optimizer, clipping),
                    *(batch, lr, seed, self.epochs, self.dtype),
                )


def default_lrs(optimizer: str, batch: int) -> tuple[float, ...]:
    """Three, so far apart that one of them trains and one is too much."""
    middle = MIDDLE_LR[optimizer] * math.sqrt(batch / 256)
    return tuple(float(f"{middle * factor:.2g}") for factor in (1 / STEP, 1.0, STEP))


def all_runs(parts: Iterable[Part]) -> list[Run]:
    """Each run once, all with the first seed before those with the next.

    Within a seed they are mixed, so that the estimate of the time left holds and a grid that is cut
    short has some of everything.
    """
    runs = list(dict.fromkeys(run for part in parts for run in part.runs()))
    random.Random(0).shuffle(runs)
    return sorted(runs, key=lambda run: run.seed)


# Two hours on two cores: five batches of 4,096 an epoch, and images of a quarter for the ResNet.
_SHORT = Part(
    data=("fashion-mnist",),
    optimizers=tuple(OF_GRIDS),
    batches=(64, 256, 1024, 4096),
    seeds=1,
    epochs=6,
    images=20480,
)
_SHORT_CNN = replace(_SHORT, models=("cnn",), seeds=2)
_SHORT_RESNET = replace(_SHORT, models=("nf_resnet",), pixels=14)
_TRANSFORMER = Part(
    models=("transformer",),
    clippings=(0.0, 0.0025, 0.01, 0.04, 0.16, 0.64),
    batches=(256,),
    epochs=24,
)
GRIDS = {
    "digits": (Part(),),
    # How much clipping is too much, for docs/choosing-clipping.md: half an hour on two cores.
    "choosing": (
        Part(
            models=("demo_nfnet",),
            clippings=(0.0, 0.0025, 0.01, 0.02, 0.04, 0.08, 0.16, 0.64),
            batches=(512,),
            lrs=(0.8, 3.2),
            epochs=30,
        ),
        replace(_TRANSFORMER, optimizers=("adamw",), lrs=(0.004, 0.016)),
        replace(_TRANSFORMER, optimizers=("sgd",), lrs=(0.4, 1.6)),
    ),
    "fashion": (
        *(_SHORT_CNN, _SHORT_RESNET),
        # Where runs with the same settings end far apart.
        replace(_SHORT_CNN, optimizers=("sgd",), batches=(1024, 4096), seeds=3),
        replace(_SHORT_RESNET, optimizers=("sgd",), batches=(4096,), seeds=3),
        # Where none of the three rates trained without AGC.
        replace(_SHORT_CNN, optimizers=("sgd",), batches=(1024,), lrs=(0.0125, 0.05), seeds=3),
        replace(_SHORT_CNN, optimizers=("sgd",), batches=(4096,), lrs=(0.025, 0.1), seeds=3),
    ),
    "fashion-gpu": (
        Part(
            data=("fashion-mnist",),
            models=("cnn", "nf_resnet_large", "bn_resnet_large"),
            optimizers=tuple(OF_GRIDS),
            clippings=(0.0, 0.01, 0.04, 0.16),
            batches=(64, 256, 1024, 4096, 8192),
            seeds=5,
            epochs=60,
            dtype="bfloat16",
        ),
    ),
}
