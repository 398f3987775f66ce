"""CIFAR-10 and CIFAR-100 are read in both formats, and nothing else is unpickled."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.lib.data import cifar
from benchmarks.lib.data.sets import DataError, Held
from tests.benchmarks.data_files import cifar_binary, cifar_python, python2_pickle, random_images

PARTS = [random_images(20, 3, 32, 10, seed=i) for i in range(6)]
FINE = [random_images(100, 3, 32, 100, seed=i) for i in range(2)]
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write(folder: Path, classes: int, kind: str) -> None:
    folder.mkdir(exist_ok=True)
    names = BATCHES if classes == 10 else ["train", "test"]
    key = "labels" if classes == 10 else "fine_labels"
    for name, held in zip(names, PARTS if classes == 10 else FINE, strict=True):
        if kind == "binary":
            (folder / f"{name}.bin").write_bytes(cifar_binary(held, coarse=classes == 100))
        else:
            (folder / name).write_bytes(cifar_python(held, key))


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("classes", [10, 100])
def test_both_formats_are_read(tmp_path: Path, classes: int, kind: str) -> None:
    write(tmp_path, classes, kind)
    read = cifar.read(tmp_path, classes)
    *parts, test = PARTS if classes == 10 else FINE
    assert isinstance(read.train, Held)
    assert isinstance(read.test, Held)
    assert torch.equal(read.train.images, torch.cat([part.images for part in parts]))
    assert torch.equal(read.train.labels, torch.cat([part.labels for part in parts]))
    assert torch.equal(read.test.images, test.images)
    assert torch.equal(read.test.labels, test.labels)
    assert (read.classes, read.flip) == (classes, True)


@pytest.mark.parametrize("name", ["cifar-10-batches-bin", "cifar-10-batches-py"])
def test_the_archive_may_lie_in_the_folder_as_it_was_unpacked(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, 10, "binary" if name.endswith("bin") else "python")
    assert len(cifar.read(tmp_path, 10).train) == 100


def refused(folder: Path, classes: int = 10) -> str:
    with pytest.raises(DataError) as error:
        cifar.read(folder, classes)
    return str(error.value)


def test_missing_files_are_told_with_what_was_found(tmp_path: Path) -> None:
    assert "CIFAR-100 takes train.bin, test.bin or train, test" in refused(tmp_path, 100)
    assert refused(tmp_path).endswith(f"{tmp_path} holds nothing")
    write(tmp_path, 10, "binary")
    for i in (2, 4):
        (tmp_path / f"data_batch_{i}.bin").unlink()
    message = refused(tmp_path)
    assert message.startswith("data_batch_2.bin, data_batch_4.bin of CIFAR-10: missing")
    assert "holds data_batch_1.bin, data_batch_3.bin" in message


def test_a_binary_file_of_another_size_is_told(tmp_path: Path) -> None:
    write(tmp_path, 10, "binary")
    (tmp_path / "data_batch_3.bin").write_bytes(cifar_binary(PARTS[0], coarse=True))
    assert "data_batch_3.bin has 61,480 bytes, not a multiple of 3,073" in refused(tmp_path)


class Opens:
    """What a malicious file would hold."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.made_by = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.made_by


def test_nothing_is_called_that_arrays_do_not_need(tmp_path: Path) -> None:
    write(tmp_path, 10, "python")
    victim = tmp_path / "victim"
    for name, call, arguments in (
        ("posix.mkdir", os.mkdir, (str(victim),)),
        ("__builtin__.eval", eval, (f"open({str(victim)!r}, 'w')",)),
    ):
        content = pickle.dumps(Opens(call, *arguments), protocol=2)
        (tmp_path / "data_batch_1").write_bytes(content)
        assert f"it asks for {name}, which arrays do not need" in refused(tmp_path)
        assert not victim.exists()


WRONG = {
    "text": b"not a pickle",
    "list": python2_pickle([1, 2]),
    "labels": python2_pickle({"labels": [1], "data": PARTS[0].images.flatten(1).numpy()}),
    "shape": python2_pickle({"labels": [1], "data": PARTS[0].images[0, 0].numpy()}),
    "fine": cifar_python(PARTS[0], "fine_labels"),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_a_wrong_pickle_is_told(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, 10, "python")
    (tmp_path / "test_batch").write_bytes(content)
    assert "test_batch is no file of CIFAR-10's python version" in refused(tmp_path)
