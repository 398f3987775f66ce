"""The small convolutional network that agc_optims compared its optimizers with."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

KERNEL = 5
PLAIN_FROM = 16  # pixels


class CNN(nn.Module):
    """Two convolutions of 6 and 16 channels, each with pooling, and two linear layers."""

    def __init__(self, pixels: int, classes: int, channels: int) -> None:
        super().__init__()
        # Without padding nothing would be left of images that are smaller than CIFAR's or MNIST's.
        padding = 0 if pixels >= PLAIN_FROM else KERNEL // 2
        self.conv1 = nn.Conv2d(channels, 6, KERNEL, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, KERNEL, padding=padding)
        side = pixels
        for _ in range(2):
            side = (side + 2 * padding - KERNEL + 1) // 2
        self.hidden = nn.Linear(16 * side**2, 120)
        self.head = nn.Linear(120, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2)
        logits: Tensor = self.head(F.relu(self.hidden(features.flatten(1))))
        return logits
