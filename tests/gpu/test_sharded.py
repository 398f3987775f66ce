"""fully_shard on one GPU, with NCCL: the same kernels as without sharding, and the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from agc_triton import AdamW_AGC
from tests.support.cuda import needs_gpu
from tests.support.plans import plan_of
from tests.support.recorded import full
from tests.support.tensors import same, weight

pytestmark = needs_gpu


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One rank."""
    from torch.distributed.device_mesh import init_device_mesh

    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


def trained(mesh: Any | None) -> tuple[list[Tensor], Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 16)).cuda()
    if mesh is not None:
        fully_shard(net, mesh=mesh)
    optimizer = AdamW_AGC(net.parameters(), lr=0.1, clipping=0.02)
    for step in range(4):
        net(weight((8, 64), device="cuda", seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [full(p) for p in net.parameters()], optimizer


def test_one_rank_steps_as_without_sharding(mesh: Any) -> None:
    expected, plain = trained(None)
    found, sharded = trained(mesh)
    assert same(found, expected)
    launched = [
        [len(part.launches.plan.buckets) for part in plan_of(optimizer).parts]
        for optimizer in (plain, sharded)
    ]
    assert launched[0] == launched[1]
