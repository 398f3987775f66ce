"""Networks to train: timm's by name where timm is installed, and the demo's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.lib.nfnet import NFNet
from benchmarks.lib.peers import imported

OWN = "demo_nfnet"
DEFAULT = "dm_nfnet_f0"
CLASSES = 10  # of our own


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
    """Whether `network` can build it."""
    timm: Any = imported("timm")
    return name == OWN or (timm is not None and bool(timm.is_model(name)))


def network(name: str, pixels: int | None = None, seed: int = 0) -> Network:
    """A network with random weights, the same for a seed; its images are of 192 pixels, or 8."""
    torch.manual_seed(seed)
    if name == OWN:
        return Network(NFNet(CLASSES), 1, pixels or 8, CLASSES)
    timm: Any = imported("timm")
    model = timm.create_model(name)
    return Network(model, model.pretrained_cfg["input_size"][0], pixels or 192, model.num_classes)
