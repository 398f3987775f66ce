"""Where the torch path keeps records: of the units of blocks, and of tensors taken whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from agc_triton.records import Page, UnitOrder, UnitRecords, Units
from agc_triton.sharded import Kind, is_sharded, kind_of
from agc_triton.torch_path.blocks import Block
from agc_triton.units import UnitDim, has_units


def record_blocks(
    records: UnitRecords, blocks: Sequence[Block], owners: Sequence[Tensor], unit_dim: UnitDim
) -> list[Page]:
    """Give blocks their records, in the order in which they come to their units.

    ``owners`` are the parameters as the optimizer knows them, by the index that blocks know.
    """
    members = dict.fromkeys(slice_.member for block in blocks for slice_ in block.whole.slices)
    if not members:
        return []
    orders = [(owners[i], UnitOrder.of_memory(owners[i], unit_dim)) for i in members]
    page, first = records.page(torch.device("cpu"), orders), 0
    for block in blocks:
        n = sum(slice_.n_units for slice_ in block.whole.slices)
        block.units = page.units()[first : first + n]
        first += n
    return [page]


def record_whole(
    records: UnitRecords,
    indices: Iterable[int],
    tensors: Sequence[Tensor],
    owners: Sequence[Tensor],
    unit_dim: UnitDim,
) -> tuple[dict[int, Units], list[Page]]:
    """Records by index of what is taken whole: of ``tensors``, which may be what lies here.

    What has no units, or whose units ranks share, has none of these.
    """
    on: defaultdict[torch.device, list[int]] = defaultdict(list)
    for i in indices:
        here = is_sharded(tensors[i]) or kind_of(owners[i], unit_dim) is not Kind.SPLIT
        if here and has_units(owners[i].shape, unit_dim):
            on[tensors[i].device].append(i)
    found: dict[int, Units] = {}
    pages = []
    for device, members in on.items():
        orders = [UnitOrder.of_norms(owners[i], unit_dim, is_sharded(tensors[i])) for i in members]
        page = records.page(device, [(owners[i], o) for i, o in zip(members, orders, strict=True)])
        found |= {i: page.units(position) for position, i in enumerate(members)}
        pages.append(page)
    return found, pages
