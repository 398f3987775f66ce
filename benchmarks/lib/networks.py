"""Networks to train: the project's own, and timm's by name where timm is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.lib.bn_resnet import BNResNet
from benchmarks.lib.cnn import CNN
from benchmarks.lib.nfnet import NFNet
from benchmarks.lib.peers import imported
from benchmarks.lib.transformer import Transformer

OWN = "demo_nfnet"
DEFAULT = "dm_nfnet_f0"
CLASSES = 10  # of random images for our own

WIDTHS = (32, 64)  # the demo's, doubled
LARGE = (32, 64, 128)  # and a stage more
# Each takes pixels, classes and channels of its images.
SMALL: dict[str, Callable[[int, int, int], nn.Module]] = {
    OWN: lambda pixels, classes, channels: NFNet(classes, channels),
    "cnn": CNN,
    "transformer": Transformer,
    "nf_resnet": lambda pixels, classes, channels: NFNet(classes, channels, WIDTHS),
    "nf_resnet_large": lambda pixels, classes, channels: NFNet(classes, channels, LARGE),
    "bn_resnet": lambda pixels, classes, channels: BNResNet(classes, channels, WIDTHS),
    "bn_resnet_large": lambda pixels, classes, channels: BNResNet(classes, channels, LARGE),
}


class Network(NamedTuple):
    """A model and the images that it takes, (channels, pixels, pixels), of so many classes."""

    model: nn.Module
    channels: int
    pixels: int
    classes: int


def default_network(device: str) -> str:
    """A large one where there is a GPU and timm to build it."""
    return DEFAULT if device == "cuda" and imported("timm") else OWN


def is_known(name: str) -> bool:
    """Whether it can be built here."""
    timm: Any = imported("timm")
    return name in SMALL or (timm is not None and bool(timm.is_model(name)))


def network(name: str, pixels: int | None = None, seed: int = 0) -> Network:
    """A network with random weights, the same for a seed; its images are of 192 pixels, or 8."""
    torch.manual_seed(seed)
    if name in SMALL:
        pixels = pixels or 8
        return Network(SMALL[name](pixels, CLASSES, 1), 1, pixels, CLASSES)
    timm: Any = imported("timm")
    model = timm.create_model(name)
    return Network(model, model.pretrained_cfg["input_size"][0], pixels or 192, model.num_classes)


def classifier(name: str, pixels: int, classes: int, channels: int) -> nn.Module:
    """A network with random weights for images of (channels, pixels, pixels)."""
    if name in SMALL:
        return SMALL[name](pixels, classes, channels)
    timm: Any = imported("timm")
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    sized = {"img_size": pixels} if fixed else {}
    model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **sized)
    return model
