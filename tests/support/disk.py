"""Checkpoints as training loops write and read them."""

from __future__ import annotations

import io
from typing import Any

import torch


def on_disk(value: Any) -> Any:
    """What is loaded of what is saved."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
