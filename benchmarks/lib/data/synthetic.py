"""Noise around one picture per class: 3,584 images of 3x32x32 to train on and 512 to test on."""

from __future__ import annotations

import torch

from benchmarks.lib.data.sets import Held, Read

CLASSES = 10
IMAGES, TESTS = 4096, 512
SHAPE = (3, 32, 32)
SIGNAL = 0.3  # the share of an image that is its class's picture


def read() -> Read:
    """The same images every time."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    blocks = torch.rand(CLASSES, 3, 4, 4, generator=rng)  # that crops move little
    pictures = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.rand(IMAGES, *SHAPE, generator=rng)
    images = SIGNAL * pictures[labels] + (1 - SIGNAL) * noise
    held = Held((255 * images).to(torch.uint8), labels)
    train, test = (held.subset(part) for part in torch.split(torch.arange(IMAGES), IMAGES - TESTS))
    return Read(train, test, CLASSES, flip=False)
