"""Networks take the images that they are built for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from agc_triton import param_groups
from benchmarks.lib import networks
from benchmarks.lib.cnn import CNN
from benchmarks.lib.networks import SMALL, classifier
from tests.support.places import DEVICE


@pytest.mark.parametrize(("pixels", "channels"), [(8, 1), (14, 1), (28, 1), (32, 3)])
@pytest.mark.parametrize("name", SMALL)
def test_every_small_network_takes_images_of_the_data(
    name: str, pixels: int, channels: int
) -> None:
    net = classifier(name, pixels, 7, channels).to(DEVICE)
    images = torch.randn(2, channels, pixels, pixels, device=DEVICE)
    assert net(images).shape == (2, 7)
    unclipped = {
        name
        for group in param_groups(net, clipping=0.1)
        if not group["clipping"]
        for name in group["param_names"]
    }
    assert unclipped == {"head.weight", "head.bias"}


def test_the_original_network_has_the_original_layers() -> None:
    shapes = [tuple(p.shape) for p in CNN(32, 10, 3).parameters() if p.dim() > 1]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (10, 120)]


def test_batch_norm_is_the_only_difference_in_the_convolutions() -> None:
    nf, bn = (
        [
            (*layer.weight.shape, *layer.stride)
            for layer in classifier(name, 28, 10, 1).modules()
            if isinstance(layer, nn.Conv2d)
        ]
        for name in ("nf_resnet", "bn_resnet")
    )
    assert nf == bn


@pytest.mark.parametrize("fixed", [False, True])
def test_models_of_timm_are_built_for_the_data(
    fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.update(name=name, **options)
        return nn.Identity()

    config = SimpleNamespace(fixed_input_size=fixed)
    timm = SimpleNamespace(
        create_model=create_model,
        get_pretrained_cfg=lambda name: config,
        is_model=lambda name: name == "theirs",
    )
    monkeypatch.setattr(networks, "imported", lambda name: timm)
    classifier("theirs", 32, 100, 3)
    size = {"img_size": 32} if fixed else {}
    assert asked == {"name": "theirs", "num_classes": 100, "in_chans": 3, **size}
    assert networks.is_known("theirs")
    assert not networks.is_known("nobody's")
