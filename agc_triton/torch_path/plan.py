"""The torch path's plan of a step: blocks that are kept while their tensors stay where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from agc_triton.norms import Clip
from agc_triton.records import Page, UnitRecords, Units
from agc_triton.rule import TensorLists, pick
from agc_triton.snapshot import Look
from agc_triton.torch_path.blocks import blocks, largest_room
from agc_triton.torch_path.recording import record_blocks, record_whole
from agc_triton.torch_path.slices import DenseView, dense_view


class BlockList:
    """Blocks of one dtype that follow each other, and the indices of their tensors.

    ``alike`` says that every gradient lies in memory as its parameter does, and in its dtype.
    """

    def __init__(self, lists: TensorLists, views: Mapping[int, DenseView], alike: bool) -> None:
        self.indices, self.alike = list(views), alike
        self.dtype = lists.params[self.indices[0]].dtype
        # Views of the tensors themselves would follow where their .data is set, and would keep them
        # from being swapped (torch.utils.swap_tensors).
        params, *states = (
            {i: role[i].data for i in views} if role else {}
            for role in (lists.params, *lists.states)
        )
        self.blocks = blocks(views, params, states)
        self.largest_room = largest_room(self.blocks)


class BlockPlan:
    """Lists of blocks of what is updated together, and the indices of what is updated whole.

    Without ``clip`` all is updated whole, by torch alone. The plan holds views of parameters and
    states, so their memory lives until it is replaced; of gradients it holds none.
    """

    def __init__(
        self,
        lists: TensorLists,
        group: Mapping[str, Any],
        clip: Clip | None,
        records: UnitRecords | None,
        owners: Sequence[Tensor],
    ) -> None:
        self._count, self._recorded = len(lists.params), records is not None
        views, self.whole = _partition(lists, group, clip)
        alike: defaultdict[torch.dtype, dict[int, DenseView]] = defaultdict(dict)
        others: list[dict[int, DenseView]] = []
        for i, view in views.items():
            param, grad = lists.params[i], lists.grads[i]
            if grad.stride() == param.stride() and grad.dtype == param.dtype:
                alike[param.dtype][i] = view
            else:  # copied, and each alone so that no two copies are alive at a time
                others.append({i: view})
        self.block_lists = [BlockList(lists, those, alike=True) for those in alike.values()]
        self.block_lists += [BlockList(lists, one, alike=False) for one in others]
        self.whole_units: dict[int, Units] = {}
        self._pages: list[Page] = []
        if records is not None:
            found = [block for listed in self.block_lists for block in listed.blocks]
            # Without a clip nobody has looked at what else there is.
            dense = [i for i in self.whole if lists.grads[i].layout is torch.strided]
            taken, unit_dim = dense if clip is None else self.whole, group["unit_dim"]
            of_whole = record_whole(records, taken, lists.params, owners, unit_dim)
            self.whole_units, self._pages = of_whole
            self._pages += record_blocks(records, found, owners, unit_dim)

    def number(self, number: int) -> None:
        """What ratios are kept from now on are of this step."""
        for page in self._pages:
            page.numbers.fill_(number)

    def look(
        self,
        lists: TensorLists,
        group: Mapping[str, Any],
        clip: Clip | None,
        records: UnitRecords | None,
    ) -> Look | None:
        """What there is now of what is in blocks, and of what is not."""
        if len(lists.params) != self._count or self._recorded != (records is not None):
            return None
        roles = (lists.params, *lists.states)
        fixed: list[Tensor] = []
        for listed in self.block_lists:
            for role in roles:
                fixed += pick(listed.indices, role)
        loose = [*lists.steps, *chain.from_iterable(lists.scalars)]
        loose += [] if clip is None else lists.grads
        if self.whole:
            for role in roles:
                loose += pick(self.whole, role)
        repeated = bool(self.whole) and _repeated(lists)
        # Without a clip too there may be ratios of units.
        key = _all_whole(group, clip), group["unit_dim"], repeated
        return Look(key, fixed, loose, [])


def _all_whole(group: Mapping[str, Any], clip: Clip | None) -> bool:
    """Whether nothing is updated in blocks."""
    # On a CPU torch refuses capturable that is not fused, and does so before it counts a step.
    capturable = group.get("capturable") and not group.get("fused")
    return clip is None or bool(group.get("foreach") or group.get("differentiable") or capturable)


def _repeated(lists: TensorLists) -> bool:
    """Whether a parameter is there twice."""
    return len(set(map(id, lists.params))) < len(lists.params)


def _partition(
    lists: TensorLists, group: Mapping[str, Any], clip: Clip | None
) -> tuple[dict[int, DenseView], list[int]]:
    """Which parameters go in blocks, and which are updated whole."""
    # A parameter that is there twice is updated by each update in turn, as torch's for-loop does.
    all_whole = _all_whole(group, clip) or (_repeated(lists) and not group.get("fused"))
    if clip is None or all_whole:
        return {}, list(range(len(lists.params)))
    views: dict[int, DenseView] = {}
    whole: list[int] = []
    roles = [role for role in lists.states if role]
    for i, param in enumerate(lists.params):
        if lists.grads[i].layout is not torch.strided:
            whole.append(i)
            continue
        view = dense_view(param, [role[i] for role in roles], clip.unit_dim)
        # What a copy in the parameter's dtype would round is clipped first.
        rounded = torch.promote_types(lists.grads[i].dtype, param.dtype) != param.dtype
        if view is None or rounded:
            whole.append(i)
        else:
            views[i] = view
    return views, whole
