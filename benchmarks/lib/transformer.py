"""A small transformer for small images: torch's own encoder over their rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 32, 4, 2


class Transformer(nn.Module):
    """Each row of pixels is a token; the mean over tokens goes to a linear head.

    Layer norm comes before attention and the feed-forward part, as is usual today; no dropout. Of
    grey images of 8x8 it has 18 thousand parameters.
    """

    def __init__(self, pixels: int, classes: int, channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels * pixels, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(pixels, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits."""
        rows = images.transpose(1, 2).flatten(2)
        logits: Tensor = self.head(self.encoder(self.embed(rows) + self.position).mean(dim=1))
        return logits
