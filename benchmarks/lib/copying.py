"""A plain copy, whose bandwidth that of a step is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.lib.optimizers import minimal_bytes
from benchmarks.lib.providers import Provider
from benchmarks.lib.timing import Step

LEAST_COPIED = 256 << 20


def copy_provider(optimizer: str) -> Provider:
    """A copy that loads and stores as many bytes as a step must: what memory allows."""

    def build(params: list[Tensor]) -> Step:
        half = minimal_bytes(optimizer, params) // 2
        words = -(-copied_at_once(2 * half) // 16)
        # Words, because torch copies single bytes more slowly; the last few are what is left. One
        # tensor of both would put them at addresses that hinder each other in a CPU's caches.
        to, source = (
            torch.ones(words, dtype=torch.int64, device=params[0].device) for _ in range(2)
        )
        whole, rest = divmod(half, 8 * words)
        pieces = [(to, source)] * whole + [(to[: rest // 8], source[: rest // 8])]
        last = slice(rest // 8 * 8, rest)
        pieces.append((to.view(torch.uint8)[last], source.view(torch.uint8)[last]))
        pieces = [piece for piece in pieces if piece[0].numel()]

        def step() -> None:
            for to, source in pieces:
                to.copy_(source)

        return step

    return Provider("copy of as many bytes", f"torch {torch.__version__}", "copy", True, build)


def copied_at_once(moved: int) -> int:
    """Bytes of both buffers of a copy: far more than caches hold, and little for large models."""
    return min(moved, max(moved // 4, LEAST_COPIED))
