"""IDX files, plain or gzipped, as MNIST and Fashion-MNIST are published."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from benchmarks.lib.data.sets import DataError, Held, Read, check_labels, found_in

CLASSES = 10
PARTS = {"train": "train", "test": "t10k"}
WANTED = ", ".join(
    f"{part}-{kind}-ubyte" for part in PARTS.values() for kind in ("images-idx3", "labels-idx1")
)
BYTES = 8  # IDX's number of the type


def read(folder: Path, flip: bool) -> Read:
    """Both parts of ten classes, each of images and labels."""
    train, test = (_read_part(folder, part) for part in PARTS.values())
    check_labels((train.labels, test.labels), CLASSES, folder)
    return Read(train, test, CLASSES, flip)


def _read_part(folder: Path, part: str) -> Held:
    images = _read_file(folder, f"{part}-images-idx3-ubyte", 3)
    labels = _read_file(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or images.shape[1] != images.shape[2]:
        raise DataError(
            f"{folder} has {part} images of shape {tuple(images.shape)} and {len(labels)} labels:"
            " as many labels as square images are needed"
        )
    return Held(images[:, None], labels.long())


def _read_file(folder: Path, name: str, dims: int) -> Tensor:
    plain, zipped = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else zipped
    if not path.is_file():
        raise DataError(
            f"{name} or {name}.gz is missing: the folder takes {WANTED}, each plain or as .gz;"
            f" {found_in(folder)}"
        )
    try:
        with gzip.open(path) if path is zipped else path.open("rb") as file:
            return _parsed(cast("BinaryIO", file), path, dims)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file: {error}") from error


def _parsed(file: BinaryIO, path: Path, dims: int) -> Tensor:
    start = file.read(4 + 4 * dims)
    magic = bytes((0, 0, BYTES, dims))
    if len(start) < 4 + 4 * dims or start[:4] != magic:
        raise DataError(
            f"{path} starts with {start[:4].hex(' ')}, not with {magic.hex(' ')}:"
            f" it is no IDX file of bytes with {dims} dimension{'s' if dims > 1 else ''}"
        )
    shape = struct.unpack(f">{dims}I", start[4:])
    size = math.prod(shape)
    # Read in pieces: a header may claim more than there is, a gzip file hold more than it claims.
    content = bytearray()
    while len(content) <= size and (piece := file.read(min(1 << 24, size + 1 - len(content)))):
        content += piece
    if len(content) != size or not size:
        more = "more" if len(content) > size else f"{len(content):,}"
        raise DataError(f"{path} claims {size:,} bytes of shape {shape} and holds {more}")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)
