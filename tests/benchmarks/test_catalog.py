"""Data by name: where they are looked for, how they are cut and placed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.lib.data import catalog, sets
from benchmarks.lib.data.catalog import load
from benchmarks.lib.data.sets import DataError, Held, with_statistics
from tests.benchmarks.data_files import random_images, write_idx
from tests.support.places import DEVICE

ON = torch.device(DEVICE)


def write(folder: Path) -> tuple[Held, Held]:
    train, test = random_images(30, 1, 6, 10), random_images(10, 1, 6, 10, seed=1)
    write_idx(folder, train, test, zipped=True)
    return train, test


def test_fashion_mnist_is_looked_for_where_debian_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path("/usr/share/datasets/fashion-mnist") == catalog.FASHION_MNIST
    write(tmp_path)
    monkeypatch.setattr(catalog, "FASHION_MNIST", tmp_path)
    assert len(load("fashion-mnist", None, 0, 0, ON).train) == 30


def test_only_what_has_two_sides_alike_is_mirrored(tmp_path: Path) -> None:
    write(tmp_path)
    assert load("fashion-mnist", tmp_path, 0, 0, ON).flip
    assert not load("mnist", tmp_path, 0, 0, ON).flip
    assert not load("digits", None, 0, 0, ON).flip


def test_data_lie_on_the_device_and_are_standardized(tmp_path: Path) -> None:
    train, _ = write(tmp_path)
    data = load("mnist", tmp_path, 0, 0, ON)
    images, labels = data.train.pick(torch.arange(30))
    standardized = data.standardized(images)
    assert standardized.device.type == labels.device.type == ON.type
    assert standardized.mean().item() == pytest.approx(0, abs=1e-5)
    assert standardized.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert data.mean.item() == pytest.approx(train.images.double().mean().item())


def test_channels_have_a_mean_of_their_own() -> None:
    images = torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), 200)], 1).to(torch.uint8)
    held = Held(images, torch.zeros(4, dtype=torch.int64))
    data = with_statistics(sets.Read(held, held, 1, False))
    assert data.mean.flatten().tolist() == [0, 200]
    assert data.channels == 2
    assert data.standardized(images).isfinite().all()


def test_a_subset_is_the_same_every_time_and_of_the_training_images_only(tmp_path: Path) -> None:
    train, _ = write(tmp_path)
    first, again = (load("mnist", tmp_path, 12, 0, ON) for _ in range(2))
    images, labels = (x.cpu() for x in first.train.pick(torch.arange(12)))
    assert torch.equal(images, again.train.pick(torch.arange(12))[0].cpu())
    assert (len(first.train), len(first.test)) == (12, 10)
    for image, label in zip(images, labels, strict=True):
        (index,) = (train.images == image).all((1, 2, 3)).nonzero().flatten().tolist()
        assert train.labels[index] == label
    with pytest.raises(DataError, match="mnist has 30 images to train on, not 31"):
        load("mnist", tmp_path, 31, 0, ON)


def test_images_are_resized_by_the_mean_of_their_areas(tmp_path: Path) -> None:
    train, _ = write(tmp_path)
    data = load("mnist", tmp_path, 0, 3, ON)
    images, _ = data.train.pick(torch.arange(30))
    expected = train.images.float().view(30, 1, 3, 2, 3, 2).mean((3, 5)).round()
    assert torch.equal(images.cpu().float(), expected)
    assert data.test.pick(torch.zeros(1, dtype=torch.int64))[0].shape[-1] == 3


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "images"])
def test_a_folder_is_asked_for(name: str) -> None:
    with pytest.raises(DataError, match=f"--data {name}=FOLDER"):
        load(name, None, 0, 0, ON)


def test_synthetic_images_are_of_their_classes() -> None:
    data = load("synthetic", None, 0, 0, ON)
    assert (len(data.train), len(data.test)) == (3584, 512)
    images, labels = data.train.pick(torch.arange(3584))
    pictures = torch.stack([images[labels == c].float().mean(0) for c in range(10)]).flatten(1)
    tests, of_tests = data.test.pick(torch.arange(512))
    nearest = torch.cdist(tests.float().flatten(1), pictures).argmin(1)
    assert (nearest == of_tests).float().mean() > 0.95
    again = load("synthetic", None, 0, 0, ON).train.pick(torch.arange(3584))[0]
    assert torch.equal(images, again)
