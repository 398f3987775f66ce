"""The functional interface: unitwise_norm and adaptive_clip_grad_."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agc_triton.dispatch import Clipper
from agc_triton.norms import Clip, clipped_rows_, spread, unit_norms
from agc_triton.options import AGC_OPTIONS
from agc_triton.records import Recording, UnitOrder, UnitRecords
from agc_triton.routing import check_backend
from agc_triton.sharded import any_sharded, axes_here, local
from agc_triton.sparse import check_sparse_rows
from agc_triton.units import UnitDim, unit_axes
from agc_triton.validation import (
    bring_gradients,
    check_grad,
    check_in_place,
    check_options,
    check_param,
    tensor_name,
)


def unitwise_norm(tensor: Tensor, unit_dim: UnitDim = None) -> Tensor:
    """L2 norm of each unit, shaped to broadcast against ``tensor``.

    Units are those of Brock et al. 2021 (arXiv 2102.06171, equation 3): rows of a matrix, output
    channels of a convolution, whole biases and gains.

    Args:
        tensor: of any shape and any real or complex floating dtype.
        unit_dim: as in `agc_triton.AdamW_AGC`.

    Returns:
        dtype fp32 (fp64 for fp64 and complex128); every dimension that does not index units has
        size 1, and one that is cut into parts its own size.

    Raises:
        TypeError: ``unit_dim`` is not one.
        ValueError: ``unit_dim`` does not fit the shape.
    """
    return spread(unit_norms(tensor, unit_dim), tensor.shape, unit_dim)


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    *,
    clipping: float | None = 1e-2,
    agc_eps: float = 1e-3,
    unit_dim: UnitDim = None,
    backend: str = "auto",
    ratios: list[Tensor | None] | None = None,
) -> None:
    """Clip ``.grad`` in place, unit by unit; parameters without a gradient are skipped.

    Each unit's gradient norm is held to ``clipping * max(||w||, agc_eps)`` (Brock et al. 2021,
    arXiv 2102.06171, equation 3). A unit at or under its limit keeps its bits, and so does one with
    NaN; of one with inf that becomes NaN and the rest zero.

    Args:
        parameters: a tensor or an iterable of tensors, of any shape and any real or complex
            floating dtype; gradients may have another. Norms are fp32, of fp64 parameters fp64.
        clipping, agc_eps, unit_dim, backend: as in `agc_triton.AdamW_AGC`.
        ratios: a list that is filled with ||g|| / max(||w||, agc_eps) of each unit before clipping:
            per parameter an fp32 tensor shaped as its `unitwise_norm`, on its device, or None where
            there is no gradient; nothing waits. With ``clipping=0`` too. Of a DTensor's units they
            are those on this rank.

    Raises:
        TypeError: something is not a tensor, or an option is of the wrong type.
        ValueError: an option is out of range.
        RuntimeError: a gradient that cannot be clipped; none has been changed then.
    """
    check_backend(backend)
    options = {"clipping": clipping, "agc_eps": agc_eps, "unit_dim": unit_dim}
    check_options(options)
    params = _as_list(parameters)
    if ratios is not None and not isinstance(ratios, list):
        raise TypeError(f"ratios must be a list to fill, not {type(ratios).__name__}")
    if not clipping and ratios is None:
        return
    clipper = _clipper(params)
    if ratios is not None and not clipper.recorder.every:
        clipper.recorder.track(1, warn=False)
    clip_groups_([{"params": params, **options}], backend, clipper, ratios is not None)
    if ratios is not None:
        ratios[:] = [
            None if p.grad is None else _shaped(clipper.recorder.records, p, unit_dim)
            for p in params
        ]


def _as_list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    one = isinstance(parameters, Tensor) or not isinstance(parameters, Iterable)
    params: list[Any] = [parameters] if one else list(parameters)
    for param in params:
        if not isinstance(param, Tensor):
            raise TypeError(
                f"adaptive_clip_grad_ takes tensors, not {type(param).__name__}; pass"
                " model.parameters()"
            )
    return params


# Plans of the latest callers; they keep no parameter alive.
_clippers: OrderedDict[tuple[int, ...], Clipper] = OrderedDict()
_CLIPPERS = 8
# What captured graphs replay outlives its plan.
_captured: list[Any] = []


def _clipper(params: list[Tensor]) -> Clipper:
    key = tuple(map(id, params))
    # Taken out and put back at the end, so that no other thread can drop it in between.
    clipper = _clippers.pop(key, None) or Clipper()
    _clippers[key] = clipper
    while len(_clippers) > _CLIPPERS:
        _, dropped = _clippers.popitem(last=False)
        _captured.extend(dropped.captured)
    return clipper


def _shaped(records: UnitRecords, param: Tensor, unit_dim: UnitDim) -> Tensor | None:
    """A parameter's latest ratios, as `unitwise_norm` shapes a tensor's norms."""
    place = records.place(param)
    if place is None:  # it has no units
        return None
    page, i = place
    whole = page.members[i].whole
    here = param if whole else local(param)
    axes = unit_axes(param.shape, unit_dim) if whole else axes_here(param, unit_dim)
    values = page.members[i].as_norms(page.ratios[page.at(i)])
    sizes = [1] * here.dim()
    for dim, parts in axes:
        sizes[dim] = parts
    values = values.clone().reshape(sizes)
    for dim, parts in axes:
        if parts and parts != here.shape[dim]:
            values = values.repeat_interleave(here.shape[dim] // parts, dim)
    return values


def clip_groups_(
    groups: Sequence[Mapping[str, Any]],
    backend: str,
    clipper: Clipper,
    tracked: bool | None = None,
) -> None:
    """Check all gradients of all groups, then clip them in place; clipping 0 or None skips a group.

    Whether ratios are kept is ``tracked``, or the clipper's recorder says it.

    Raises:
        ValueError, TypeError, RuntimeError: as `adaptive_clip_grad_`; nothing has been changed.
    """
    if any(any_sharded(group["params"]) for group in groups):
        bring_gradients(groups)
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if group["clipping"] and param.grad is not None:
                _check(param, param.grad, group, index, i)
    dense: list[dict[str, Any]] = []
    sparse: list[tuple[Tensor, Mapping[str, Any]]] = []
    for group in groups:
        params = group["params"] if group["clipping"] else []
        others = [p for p in params if p.grad is not None and p.grad.layout is not torch.strided]
        sparse += [(p, group) for p in others]
        if others:
            params = [p for p in params if p.grad is None or p.grad.layout is torch.strided]
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        dense.append({**{key: group[key] for key in AGC_OPTIONS}, **names, "params": params})
    others = [group for group in groups if not group["clipping"]]
    recording = clipper.clip_(dense, others, backend, tracked)
    for param, group in sparse:
        _clip_sparse_rows_(param, group, recording)


def _check(param: Tensor, grad: Tensor, group: Mapping[str, Any], index: int, i: int) -> None:
    check_param(param, group["unit_dim"], group, index, i)
    check_grad(param, grad, group, index, i)
    if grad.layout is torch.strided:
        check_in_place(grad, group, index, i)
    else:
        check_sparse_rows(param, grad, group["unit_dim"], tensor_name(group, index, i))


def _clip_sparse_rows_(param: Tensor, group: Mapping[str, Any], recording: Recording) -> None:
    """Clip a row-sparse gradient, each row that is there against its row of the parameter."""
    clip, units = Clip.of(group, recording), None
    if recording.number is not None:
        order = UnitOrder.of_norms(param, clip.unit_dim)
        page = recording.records.page(param.device, [(param, order)])
        page.numbers.fill_(recording.number)
        units = page.units()
    param.grad = clipped_rows_(param, param.grad, clip, units)
