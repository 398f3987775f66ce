"""Small files in the formats that MNIST, CIFAR and ImageNet are published in."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.data.sets import Held


def random_images(count: int, channels: int, pixels: int, classes: int, seed: int = 0) -> Held:
    """Every class is among them, if they are enough."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (count, channels, pixels, pixels)
    images = torch.randint(256, shape, generator=drawn, dtype=torch.uint8)
    return Held(images, torch.arange(count) % classes)


def idx_bytes(values: Tensor) -> bytes:
    """Big-endian sizes after two zeros, the number of the type and that of dimensions."""
    start = bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape)
    return start + values.to(torch.uint8).numpy().tobytes()


def write_idx(folder: Path, train: Held, test: Held, zipped: bool) -> None:
    """Four files."""
    for part, held in {"train": train, "t10k": test}.items():
        for name, values in {
            f"{part}-images-idx3-ubyte": held.images[:, 0],
            f"{part}-labels-idx1-ubyte": held.labels,
        }.items():
            content = idx_bytes(values)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


def cifar_binary(held: Held, coarse: bool) -> bytes:
    """A label, or a coarse and a fine one, before each image."""
    labels = held.labels[:, None].to(torch.uint8)
    labels = torch.cat([labels // 5, labels], 1) if coarse else labels
    return torch.cat([labels, held.images.flatten(1)], 1).numpy().tobytes()


class Python2Pickler(pickle._Pickler):
    """Writes strings and arrays as Python 2 did, in which CIFAR's files were pickled."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes | str) -> None:
        content = value.encode() if isinstance(value, str) else value
        pickler: Any = self  # whose types tell of its public part only
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        pickler.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value: Any) -> bytes:
    """Protocol 2, with the module's name of that time."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_python(held: Held, key: str) -> bytes:
    """A dict of an array, a list and what nobody needs."""
    rows: np.ndarray[Any, Any] = held.images.flatten(1).numpy()
    names = ["of_an_image.png"] * len(held)
    return python2_pickle(
        {"batch_label": "a batch", key: held.labels.tolist(), "data": rows, "filenames": names}
    )
