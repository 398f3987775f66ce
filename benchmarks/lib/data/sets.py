"""Images with labels: held in memory, and what a data set consists of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLE = 2048  # images that mean and standard deviation are taken from
AT_ONCE = 1024  # images that are looked at together


class DataError(Exception):
    """Files that are missing or not what they should be."""


class Images(Protocol):
    """Images of bytes, (N, channels, pixels, pixels), with the numbers of their classes."""

    def __len__(self) -> int: ...

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels on the device; the indices are on the CPU."""
        ...

    def subset(self, indices: Tensor) -> Images:
        """Some of them."""
        ...


@dataclass(frozen=True)
class Held:
    """`Images` in the memory of one device."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images have {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels; the indices are on the CPU."""
        there = indices.to(self.labels.device)
        return self.images[there], self.labels[there]

    def subset(self, indices: Tensor) -> Held:
        """Some of them, without the memory of the others."""
        return Held(*self.pick(indices))

    def to(self, on: torch.device) -> Held:
        """On another device."""
        return Held(self.images.to(on), self.labels.to(on))

    def resized(self, pixels: int) -> Held:
        """With sides of so many pixels, each the mean of the area that it covers."""
        parts = [
            F.interpolate(part.float(), (pixels, pixels), mode="area").round().to(torch.uint8)
            for part in chunks(self.images)
        ]
        return Held(torch.cat(parts), self.labels)


class Read(NamedTuple):
    """What a reader found; ``flip``: a mirrored image is one of the same class."""

    train: Images
    test: Images
    classes: int
    flip: bool


class Dataset(NamedTuple):
    """What is trained on, on one device; mean and std are (channels, 1, 1)."""

    train: Images
    test: Images
    classes: int
    flip: bool
    mean: Tensor
    std: Tensor

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.mean)

    def standardized(self, images: Tensor) -> Tensor:
        """Bytes as numbers of mean 0 and variance 1 over the images of training."""
        return (images.float() - self.mean) / self.std


def chunks(tensor: Tensor, size: int = AT_ONCE) -> Iterator[Tensor]:
    """Parts along the first dimension, in order, so that little memory is needed at once."""
    return (tensor[i : i + size] for i in range(0, len(tensor), size))


def with_statistics(read: Read) -> Dataset:
    """Mean and standard deviation of each channel, of evenly spaced images."""
    count = len(read.train)
    indices = torch.linspace(0, count - 1, min(count, SAMPLE)).round().long()
    first, second = torch.zeros(()), torch.zeros(())
    for part in chunks(indices):
        images = read.train.pick(part)[0].double()
        first = first.to(images) + images.mean((0, 2, 3)) * len(part) / len(indices)
        second = second.to(images) + images.square().mean((0, 2, 3)) * len(part) / len(indices)
    std = (second - first.square()).clamp(min=1e-12).sqrt()
    mean, std = (x.float()[:, None, None] for x in (first, std))
    return Dataset(*read, mean, std)


def found_in(folder: Path) -> str:
    """What a folder holds, for a message."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{folder} holds {', '.join(names[:12]) + more if names else 'nothing'}"


def check_labels(labels: Iterable[Tensor], classes: int, where: Path) -> None:
    """Every label is a class."""
    for of_part in labels:
        if of_part.numel() and not 0 <= int(of_part.min()) <= int(of_part.max()) < classes:
            raise DataError(
                f"{where} has labels from {int(of_part.min())} to {int(of_part.max())}, not"
                f" 0 to {classes - 1}: these are files of other data"
            )
