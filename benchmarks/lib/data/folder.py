"""A folder of image files, a folder per class, as ImageNet is laid out; decoded when needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.data.sets import DataError, Read, found_in
from benchmarks.lib.peers import imported

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TESTS = ("val", "test")
SHOWN = 0.875  # of the shorter side, as usual for ImageNet
LAYOUT = "the folder takes train/CLASS/*.jpg and val/CLASS/*.jpg (or .jpeg, .png, .bmp, .webp)"


@dataclass(frozen=True)
class Files:
    """`Images` that stay on the disk until they are picked."""

    paths: list[str]
    labels: Tensor
    pixels: int
    on: torch.device

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Decode them, several at a time; the indices are on the CPU."""
        paths = [self.paths[i] for i in indices.tolist()]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda path: decoded(path, self.pixels), paths))
        return torch.stack(images).to(self.on), self.labels[indices].to(self.on)

    def subset(self, indices: Tensor) -> Files:
        """Some of them."""
        paths = [self.paths[i] for i in indices.tolist()]
        return replace(self, paths=paths, labels=self.labels[indices])


def read(folder: Path, pixels: int, on: torch.device) -> Read:
    """Names only; the classes are the folders' names in order."""
    if imported("PIL.Image") is None:
        raise DataError("images in folders are decoded by Pillow: pip install pillow")
    found = [folder / name for name in TESTS if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not found:
        raise DataError(f"{LAYOUT}; {found_in(folder)}")
    classes = _classes(folder / "train")
    if classes != _classes(found[0]):
        different = sorted(set(classes) ^ set(_classes(found[0])))
        raise DataError(
            f"{folder / 'train'} and {found[0]} must have the same classes; one of them lacks"
            f" {', '.join(different[:12])}"
        )
    train, test = (_files(place, classes, pixels, on) for place in (folder / "train", found[0]))
    return Read(train, test, len(classes), flip=True)


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _files(folder: Path, classes: list[str], pixels: int, on: torch.device) -> Files:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = [
            entry.path
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(ENDINGS)
        ]
        if not of_class:
            raise DataError(f"no image in a class: {LAYOUT}; {found_in(folder / name)}")
        paths += sorted(of_class)
        labels += [label] * len(of_class)
    if not paths:
        raise DataError(f"{LAYOUT}; {found_in(folder)}")
    return Files(paths, torch.tensor(labels), pixels, on)


def decoded(path: str, pixels: int) -> Tensor:
    """Resized so that its center, a square of so many pixels, has most of its shorter side."""
    pillow: Any = imported("PIL.Image")
    try:
        with pillow.open(path) as image:
            image.draft("RGB", (2 * pixels, 2 * pixels))  # JPEGs are decoded at a smaller scale
            image = image.convert("RGB")
            scale = pixels / SHOWN / min(image.size)
            image = image.resize([max(pixels, round(side * scale)) for side in image.size])
            left, top = ((side - pixels) // 2 for side in image.size)
            cut = image.crop((left, top, left + pixels, top + pixels))
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded: {error}; mend or remove it") from error
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()
