"""CIFAR-10 and CIFAR-100 in their binary and python formats."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.lib.data.sets import DataError, Held, Read, check_labels, found_in

SHAPE = (3, 32, 32)
SIZE = 3072


class Format(NamedTuple):
    """Files of one format; ``subfolder`` is what the archive unpacks to."""

    train: tuple[str, ...]
    test: str
    subfolder: str
    parse: Callable[[bytes, Path, int], Held]


def read(folder: Path, classes: int) -> Read:
    """The format that is there, in the folder or where its archive unpacks to."""
    formats = FORMATS[classes]
    for kind in formats:
        for place in (folder, folder / kind.subfolder):
            if (place / kind.test).is_file():
                return _read_files(place, kind, classes)
    wanted = " or ".join(", ".join((*kind.train, kind.test)) for kind in formats)
    raise DataError(f"CIFAR-{classes} takes {wanted}; {found_in(folder)}")


def _read_files(folder: Path, kind: Format, classes: int) -> Read:
    missing = [name for name in kind.train if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{', '.join(missing)} of CIFAR-{classes}: missing; {found_in(folder)}")

    def parsed(name: str) -> Held:
        return kind.parse((folder / name).read_bytes(), folder / name, classes)

    parts = [parsed(name) for name in kind.train]
    images = torch.cat([part.images for part in parts])
    train = Held(images, torch.cat([part.labels for part in parts]))
    test = parsed(kind.test)
    check_labels((train.labels, test.labels), classes, folder)
    return Read(train, test, classes, flip=True)


def _binary(content: bytes, path: Path, classes: int) -> Held:
    """Records of one label, or a coarse and a fine one, and an image."""
    labels = 1 if classes == 10 else 2
    record = labels + SIZE
    if not content or len(content) % record:
        raise DataError(
            f"{path} has {len(content):,} bytes, not a multiple of {record:,}: it is no file of"
            f" CIFAR-{classes}'s binary version"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    images = records[:, labels:].reshape(-1, *SHAPE)
    return Held(images, records[:, labels - 1].long())


def _python(content: bytes, path: Path, classes: int) -> Held:
    """A pickled dict of an array and a list; nothing else is unpickled."""
    key = b"labels" if classes == 10 else b"fine_labels"
    try:
        found = Unpickler(io.BytesIO(content), encoding="bytes").load()
        images = torch.from_numpy(np.ascontiguousarray(found[b"data"], dtype=np.uint8))
        return Held(images.view(-1, *SHAPE), torch.tensor(found[key], dtype=torch.int64))
    except Exception as error:  # whatever bytes of another format lead to
        raise DataError(
            f"{path} is no file of CIFAR-{classes}'s python version: {error}"
        ) from error


class Unpickler(pickle.Unpickler):
    """Makes arrays of numbers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that pickled arrays need."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which arrays do not need")


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
FORMATS = {
    10: (
        Format(
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            "cifar-10-batches-bin",
            _binary,
        ),
        Format(_BATCHES, "test_batch", "cifar-10-batches-py", _python),
    ),
    100: (
        Format(("train.bin",), "test.bin", "cifar-100-binary", _binary),
        Format(("train",), "test", "cifar-100-python", _python),
    ),
}
