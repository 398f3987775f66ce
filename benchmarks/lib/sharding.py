"""DTensors of what every rank has, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard


def placed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Of equal tensors on all ranks; ``distribute_tensor`` can do so from torch 2.7 on."""
    here, at = whole.detach(), mesh.get_coordinate()
    assert at is not None  # this rank belongs to the mesh
    for i, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = torch.chunk(here, mesh.size(i), placement.dim)
            here = parts[at[i]] if at[i] < len(parts) else here.narrow(placement.dim, 0, 0)
    here = here.clone(memory_format=torch.contiguous_format)
    kept: Any = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(here, mesh, placements, **kept)
