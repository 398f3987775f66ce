"""A small normalizer-free residual network for small images.

NF-ResNet (Brock et al. 2021, arXiv 2101.08692) in its pre-activation form, with the SkipInit scalar
of NFNet (arXiv 2102.06171): no batch statistics anywhere, so nothing but the weights' scale and
the optimizer keeps the signal in range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# 1 / sqrt(Var[relu(x)]) for x ~ N(0, 1): with it the activation keeps unit variance.
RELU_GAMMA = math.sqrt(2 / (1 - 1 / math.pi))

WIDTHS = (16, 32)  # channels of each stage
DEPTH = 2  # residual blocks of each stage
ALPHA = 0.2  # scale of every residual branch, as in both papers


def scaled_relu(x: Tensor) -> Tensor:
    """ReLU times its variance-preserving gain."""
    return F.relu(x) * RELU_GAMMA


class ScaledStdConv2d(nn.Conv2d):
    """Convolution whose filters have mean 0 and variance 1 / fan_in, times a learnable gain."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]  # bias=True above
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))

    def standardized_weight(self) -> Tensor:
        """The weight the convolution uses."""
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        fan_in = self.weight[0].numel()
        scale = (var * fan_in).clamp(min=1e-4).rsqrt() * self.gain
        weight: Tensor = (self.weight - mean) * scale
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardized weight."""
        out: Tensor = self._conv_forward(x, self.standardized_weight(), self.bias)
        return out


class NFBlock(nn.Module):
    """``h + ALPHA * skip_gain * f(h / beta)``, where beta is the expected std of h."""

    def __init__(self, in_channels: int, channels: int, stride: int, beta: float):
        super().__init__()
        self.beta = beta
        self.conv1 = ScaledStdConv2d(in_channels, channels, 3, stride)
        self.conv2 = ScaledStdConv2d(channels, channels, 3)
        self.shortcut = ScaledStdConv2d(in_channels, channels, 1, stride) if stride > 1 else None
        self.skip_gain = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """Add the residual branch to the shortcut."""
        x = scaled_relu(h / self.beta)
        shortcut = h if self.shortcut is None else self.shortcut(x)
        out: Tensor = shortcut + ALPHA * self.skip_gain * self.conv2(scaled_relu(self.conv1(x)))
        return out


def stages(widths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Channels that come in and go out of each block of ``DEPTH`` a stage, and its stride."""
    channels = widths[0]
    for stage, width in enumerate(widths):
        for i in range(DEPTH):
            yield channels, width, 2 if stage > 0 and i == 0 else 1
            channels = width


def small_head(channels: int, classes: int) -> nn.Linear:
    """A linear layer that starts with logits near 0."""
    head = nn.Linear(channels, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class NFNet(nn.Module):
    """Stem, stages of residual blocks, global pooling and a linear head.

    Of grey images and ``WIDTHS`` it has 43 thousand parameters.
    """

    def __init__(self, classes: int, channels: int = 1, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.stem = ScaledStdConv2d(channels, widths[0], 3, stride=2)
        blocks: list[NFBlock] = []
        expected_var = 1.0
        for in_channels, width, stride in stages(widths):
            blocks.append(NFBlock(in_channels, width, stride, beta=math.sqrt(expected_var)))
            # A convolution on the shortcut brings the variance back to 1.
            expected_var = (1.0 if stride > 1 else expected_var) + ALPHA**2
        self.blocks = nn.Sequential(*blocks)
        self.head = small_head(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits of images of unit variance."""
        features = scaled_relu(self.blocks(self.stem(images)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
