"""Data by name."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.lib.data import cifar, digits, folder, idx, synthetic
from benchmarks.lib.data.sets import DataError, Dataset, Held, Images, Read, with_statistics

# Where Debian's package dataset-fashion-mnist puts it.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "images", "synthetic")
PIXELS = 224  # of images in folders, which have no size of their own


def load(name: str, place: Path | None, images: int, pixels: int, on: torch.device) -> Dataset:
    """Data on a device, with the first ``images`` of a fixed random order to train on.

    ``images`` and ``pixels`` of 0 leave as many as there are.
    """
    read = _read(name, place, pixels, on)
    count = len(read.train)
    if images > count:
        raise DataError(f"{name} has {count:,} images to train on, not {images:,}")
    if images:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        read = read._replace(train=read.train.subset(order[:images]))
    train, test = (_placed(part, pixels, on) for part in (read.train, read.test))
    return with_statistics(read._replace(train=train, test=test))


def _read(name: str, place: Path | None, pixels: int, on: torch.device) -> Read:
    if name == "digits":
        return digits.read()
    if name == "synthetic":
        return synthetic.read()
    if name == "fashion-mnist":
        return idx.read(place or FASHION_MNIST, flip=True)
    if place is None:
        raise DataError(f"where is {name}? --data {name}=FOLDER")
    if name == "mnist":
        return idx.read(place, flip=False)
    if name == "images":
        return folder.read(place, pixels or PIXELS, on)
    return cifar.read(place, classes=int(name.removeprefix("cifar")))


def _placed(part: Images, pixels: int, on: torch.device) -> Images:
    if not isinstance(part, Held):
        return part
    return (part.resized(pixels) if pixels else part).to(on)
