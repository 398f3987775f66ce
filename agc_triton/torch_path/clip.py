"""Clipping on the torch path without an update: gradients are scaled where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agc_triton.norms import Clip, unit_norms
from agc_triton.records import Page, Recording, Units
from agc_triton.sharded import Kind, local
from agc_triton.torch_path.blocks import blocks, largest_room
from agc_triton.torch_path.recording import record_blocks, record_whole
from agc_triton.torch_path.scratch import Scratch
from agc_triton.torch_path.slices import DenseView, dense_view
from agc_triton.torch_path.step import tensor_factors


def clip_grads_(
    owners: Sequence[Tensor], clip: Clip, kinds: Mapping[int, Kind], recording: Recording
) -> None:
    """Scale dense gradients in place; a unit at or under its limit keeps its bits.

    ``kinds`` are those of DTensors by their id; of whole units what lies here is clipped.
    """
    keep = [kinds.get(id(param)) is Kind.OTHER for param in owners]
    grads: list[Any] = [param.grad for param in owners]
    params, grads = (
        [t if stays else local(t) for t, stays in zip(role, keep, strict=True)]
        for role in (owners, grads)
    )
    whole: list[int] = []
    by_dtype: defaultdict[torch.dtype, dict[int, DenseView]] = defaultdict(dict)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        view = dense_view(param, [grad], clip.unit_dim)
        if view is None:
            whole.append(i)
        else:
            by_dtype[param.dtype][i] = view
    found = [block for views in by_dtype.values() for block in blocks(views, params, [grads])]
    units: dict[int, Units] = {}
    if recording.number is not None:
        pages: list[Page] = record_blocks(recording.records, found, owners, clip.unit_dim)
        units, others = record_whole(recording.records, whole, params, owners, clip.unit_dim)
        for page in pages + others:
            page.numbers.fill_(recording.number)
    for i in whole:
        grads[i].mul_(tensor_factors(params[i], grads[i], clip, units.get(i)))
    scratch = Scratch(largest_room(found))
    for block in found:
        factors = block.factors(block.whole.states[0], clip, None, scratch)
        for target in block.targets:
            block.scale_(target.states[0], factors)


@torch.no_grad()
def track_grads(group: Mapping[str, Any], recording: Recording) -> None:
    """Keep the ratios of a group that is not clipped, where gradients are dense and have units.

    Those of DTensors are all of theirs, wherever they lie.
    """
    assert recording.number is not None
    unit_dim = group["unit_dim"]
    params: list[Any] = [
        p for p in group["params"] if p.grad is not None and p.grad.layout is torch.strided
    ]
    found, pages = record_whole(recording.records, range(len(params)), params, params, unit_dim)
    for page in pages:
        page.numbers.fill_(recording.number)
    for i, units in found.items():
        norms = unit_norms(params[i], unit_dim), unit_norms(params[i].grad, unit_dim)
        units.track(*norms, group["agc_eps"])
