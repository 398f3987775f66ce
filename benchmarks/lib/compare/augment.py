"""Random crops and mirror images of whole batches, where the batch is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(images: Tensor, flip: bool) -> Tensor:
    """Each image moved by up to an eighth of its side, on black; with ``flip`` half are mirrored.

    Random numbers are the CPU's, so that they do not depend on the device.
    """
    count, channels, side, _ = images.shape
    pad = side // 8
    top, left = torch.randint(2 * pad + 1, (2, count, 1))
    across = torch.arange(side)
    rows, columns = top + across, left + across
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    of_image = torch.arange(count, device=images.device)[:, None, None, None]
    of_channel = torch.arange(channels, device=images.device)[:, None, None]
    padded = F.pad(images, [pad] * 4)
    return padded[of_image, of_channel, rows[:, None, :, None], columns[:, None, None, :]]
