"""IDX files are read as they are published, and others refused with what was found."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from benchmarks.lib.data import idx
from benchmarks.lib.data.sets import DataError, Held
from tests.benchmarks.data_files import idx_bytes, random_images, write_idx

TRAIN, TEST = random_images(20, 1, 6, 10), random_images(10, 1, 6, 10, seed=1)


@pytest.mark.parametrize("zipped", [False, True])
def test_both_parts_are_read(tmp_path: Path, zipped: bool) -> None:
    write_idx(tmp_path, TRAIN, TEST, zipped)
    read = idx.read(tmp_path, flip=True)
    assert (read.classes, read.flip) == (10, True)
    for found, written in ((read.train, TRAIN), (read.test, TEST)):
        assert isinstance(found, Held)
        assert torch.equal(found.images, written.images)
        assert torch.equal(found.labels, written.labels)


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        idx.read(folder, flip=False)
    return str(error.value)


def test_a_missing_folder_is_told_with_the_files_that_it_takes(tmp_path: Path) -> None:
    message = refused(tmp_path / "absent")
    assert message.startswith("train-images-idx3-ubyte or train-images-idx3-ubyte.gz is missing")
    for name in ("train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert f"{name}-ubyte" in message
    assert message.endswith(f"{tmp_path / 'absent'} is no folder")


def test_a_missing_file_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    write_idx(tmp_path, TRAIN, TEST, zipped=False)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    message = refused(tmp_path)
    assert message.startswith("t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz is missing")
    there = ("t10k-images-idx3-ubyte", "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    assert message.endswith(", ".join(there))


IMAGES = idx_bytes(TRAIN.images[:, 0])
WRONG = {
    "labels": (idx_bytes(TRAIN.labels), "starts with 00 00 08 01, not with 00 00 08 03"),
    "text": (b"<html>not found</html>", "starts with 3c 68 74 6d"),
    "empty": (b"", "it is no IDX file of bytes with 3 dimensions"),
    "cut": (IMAGES[:-7], "claims 720 bytes of shape (20, 6, 6) and holds 713"),
    "longer": (IMAGES + b"x", "holds more"),
    "fewer": (idx_bytes(TRAIN.images[:9, 0]), "of shape (9, 6, 6) and 20 labels"),
    "oblong": (idx_bytes(TRAIN.images[:, 0, :4]), "as many labels as square images"),
    "huge": (bytes((0, 0, 8, 3)) + b"\xff" * 12 + b"few", "and holds 3"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    write_idx(tmp_path, TRAIN, TEST, zipped=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    assert message in refused(tmp_path)


def test_a_broken_gzip_file_is_told(tmp_path: Path) -> None:
    write_idx(tmp_path, TRAIN, TEST, zipped=True)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    for content in (b"no gzip", gzip.compress(idx_bytes(TRAIN.labels))[:-9]):
        file.write_bytes(content)
        assert f"{file} is no whole gzip file" in refused(tmp_path)


def test_labels_of_other_data_are_told(tmp_path: Path) -> None:
    write_idx(tmp_path, random_images(20, 1, 6, 20), TEST, zipped=False)
    assert f"{tmp_path} has labels from 0 to 19, not 0 to 9" in refused(tmp_path)
