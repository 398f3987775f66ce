"""Folders of image files are read as ImageNet is laid out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.lib.data import folder
from benchmarks.lib.data.sets import DataError
from tests.support.places import DEVICE

ON = torch.device(DEVICE)
COLORS = {"ant": (255, 0, 0), "bee": (0, 0, 255)}


def write(place: Path) -> None:
    """Two images of each class, wide and high, with a green rim that the center lacks."""
    for part in ("train", "val"):
        for name, color in COLORS.items():
            (place / part / name).mkdir(parents=True)
            for size, ending in (((80, 40), "JPEG"), ((40, 60), "png")):
                image = Image.new("RGB", size, (0, 255, 0))
                left, top = ((side - 36) // 2 for side in size)
                image.paste(color, (left, top, left + 36, top + 36))
                image.save(place / part / name / f"{size[0]}.{ending}", quality=95)


def test_images_are_resized_and_their_center_is_taken(tmp_path: Path) -> None:
    write(tmp_path)
    read = folder.read(tmp_path, 16, ON)
    assert (read.classes, read.flip, len(read.train), len(read.test)) == (2, True, 4, 4)
    images, labels = read.train.pick(torch.tensor([3, 0, 1]))
    assert (images.shape, images.dtype, images.device.type) == (
        (3, 3, 16, 16),
        torch.uint8,
        ON.type,
    )
    assert labels.tolist() == [1, 0, 0]
    expected = torch.tensor([COLORS["bee"], COLORS["ant"], COLORS["ant"]], device=ON)
    center = images[:, :, 2:-2, 2:-2].float()
    assert (center - expected[:, :, None, None]).abs().max() < 16


def test_a_subset_keeps_images_and_labels_together(tmp_path: Path) -> None:
    write(tmp_path)
    read = folder.read(tmp_path, 8, ON)
    images, labels = read.train.subset(torch.tensor([2, 0])).pick(torch.tensor([0]))
    assert torch.equal(images, read.train.pick(torch.tensor([2]))[0])
    assert labels.tolist() == [1]


def test_grey_images_become_colored(tmp_path: Path) -> None:
    Image.new("L", (9, 9), 100).save(tmp_path / "grey.png")
    assert torch.equal(
        folder.decoded(str(tmp_path / "grey.png"), 4), torch.full((3, 4, 4), 100).byte()
    )


def refused(place: Path) -> str:
    with pytest.raises(DataError) as error:
        folder.read(place, 8, ON)
    return str(error.value)


def test_another_layout_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent").endswith("absent is no folder")
    write(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cat")
    assert "one of them lacks bee, cat" in refused(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "bee").rename(tmp_path / "bee")
    assert refused(tmp_path).endswith("cat holds nothing")
    (tmp_path / "train").rename(tmp_path / "training")
    message = refused(tmp_path)
    assert "train/CLASS/*.jpg and val/CLASS/*.jpg" in message
    assert message.endswith("holds bee, training, val")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.jpg cannot be decoded"):
        folder.decoded(str(tmp_path / "a.jpg"), 8)


def test_pillow_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "imported", lambda module: None)
    assert "pip install pillow" in refused(tmp_path)
