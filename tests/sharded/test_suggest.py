"""suggest_clipping of a sharded model says on every rank what it says of the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agc_triton import SGD_AGC, param_groups, suggest_clipping
from tests.support.ranks import RANKS, on_ranks
from tests.support.ratios import RTOL
from tests.support.tensors import same


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.LayerNorm(10), nn.Linear(10, 4))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def numbers_of(model: nn.Module, batches: list[Tensor]) -> Tensor:
    optimizer = SGD_AGC(param_groups(model, exclude_head=False), lr=0.1)
    table = suggest_clipping(model, loss_fn, batches, optimizer, target=0.3)
    return torch.from_numpy(table.select_dtypes("number").to_numpy(dtype="float64"))


def batches_of(rank: int) -> list[Tensor]:
    rng = torch.Generator("cpu").manual_seed(rank)
    return [torch.randn(8, 6, generator=rng, device="cpu") for _ in range(2)]


def on_rank(rank: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = model_of(0)
    fully_shard(model)
    params: list[Any] = list(model.parameters())
    before = [p.to_local().clone() for p in params]
    found = numbers_of(model, batches_of(rank))
    after = [p.to_local() for p in params]
    assert all(p.grad is None for p in params)
    return found, same(before, after)


def test_every_rank_is_told_what_holds_for_the_whole_model(tmp_path: Path) -> None:
    both = [torch.cat(parts) for parts in zip(*map(batches_of, range(RANKS)), strict=True)]
    expected = numbers_of(model_of(0), both)
    for found, as_it_was in on_ranks(on_rank, tmp_path):
        torch.testing.assert_close(found, expected, rtol=RTOL, atol=0, equal_nan=True)
        assert as_it_was
