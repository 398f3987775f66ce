"""Crops and mirror images are of whole batches, and what they are said to be."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.lib.compare.augment import crop_and_flip
from tests.support.places import DEVICE


def distinct(count: int, channels: int = 2, side: int = 16) -> torch.Tensor:
    """Bytes of which none is 0, as the border is."""
    shape = (count, channels, side, side)
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, shape, generator=drawn, dtype=torch.uint8).to(DEVICE)


def made_of(image: torch.Tensor, found: torch.Tensor) -> list[tuple[int, int, bool]]:
    """Moves down and right, and whether mirrored, that give what was found."""
    padded = F.pad(image, [2] * 4)
    cuts = {(y, x): padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
    return [
        (y, x, flipped)
        for (y, x), cut in cuts.items()
        for flipped in (False, True)
        if torch.equal(found, cut.flip(2) if flipped else cut)
    ]


def test_each_image_is_moved_and_mirrored_by_itself() -> None:
    torch.manual_seed(0)
    images = distinct(400)
    found = crop_and_flip(images, flip=True)
    moves = [made_of(image, out) for image, out in zip(images, found, strict=True)]
    assert all(len(move) == 1 for move in moves)
    assert {move for (move,) in moves} == {
        (y, x, flipped) for y in range(5) for x in range(5) for flipped in (False, True)
    }


def test_without_flip_nothing_is_mirrored() -> None:
    images = distinct(50)
    moves = [made_of(*pair) for pair in zip(images, crop_and_flip(images, False), strict=True)]
    assert not any(flipped for ((_, _, flipped),) in moves)


def test_random_numbers_are_those_of_the_seed_on_any_device() -> None:
    outs = []
    for device in (DEVICE, "cpu"):
        torch.manual_seed(3)
        outs.append(crop_and_flip(distinct(8).to(device), flip=True).cpu())
    assert torch.equal(*outs)


def test_tiny_images_stay_where_they_are() -> None:
    images = distinct(4, side=7)
    assert torch.equal(crop_and_flip(images, flip=False), images)
