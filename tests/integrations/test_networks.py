"""timm's models are built for the images that benchmarks.compare trains on."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lib.networks import classifier, is_known


@pytest.mark.parametrize(
    ("name", "pixels", "channels"),
    [("resnet18", 28, 1), ("vit_tiny_patch16_224", 32, 3), ("nf_resnet26", 32, 3)],
)
def test_a_model_takes_the_images(name: str, pixels: int, channels: int) -> None:
    assert is_known(name)
    net = classifier(name, pixels, 7, channels)
    assert net(torch.randn(2, channels, pixels, pixels)).shape == (2, 7)
