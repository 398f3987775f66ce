"""The normalizer-free network's counterpart with batch norm, stage by stage the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.nfnet import small_head, stages


def conv(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution whose bias a norm would remove."""
    layer = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


class BNBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut = conv(in_channels, channels, 1, stride) if stride > 1 else None

    def forward(self, h: Tensor) -> Tensor:
        """Add the residual branch to the shortcut."""
        x = F.relu(self.norm1(h))
        shortcut = h if self.shortcut is None else self.shortcut(x)
        out: Tensor = shortcut + self.conv2(F.relu(self.norm2(self.conv1(x))))
        return out


class BNResNet(nn.Module):
    """Stem, stages of residual blocks, a last norm, global pooling and a linear head."""

    def __init__(self, classes: int, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = conv(channels, widths[0], 3, stride=2)
        self.blocks = nn.Sequential(*(BNBlock(*block) for block in stages(widths)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = small_head(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits."""
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
