"""The normalizer-free network keeps the scale of its signal."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lib.nfnet import NFBlock, ScaledStdConv2d, scaled_relu


def test_filters_have_mean_0_and_the_norm_of_their_gain() -> None:
    torch.manual_seed(0)
    conv = ScaledStdConv2d(3, 5, 3)
    with torch.no_grad():
        conv.weight.mul_(7).add_(1)
        conv.gain.uniform_(0.5, 2)
        rows = conv.standardized_weight().flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows.norm(dim=1), conv.gain.detach().flatten())


def test_activation_keeps_unit_variance() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert scaled_relu(x).var().item() == pytest.approx(1, abs=0.01)


def test_blocks_start_as_their_shortcut() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 16, 4, 4)
    same = NFBlock(16, 16, 1, beta=1.0)
    assert torch.equal(same(h), h)
    halving = NFBlock(16, 32, 2, beta=2.0)
    assert halving.shortcut is not None
    assert torch.equal(halving(h), halving.shortcut(scaled_relu(h / 2)))
