"""Checks before anything is changed; messages name the group or tensor, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from agc_triton.rule import KernelRule, Work
from agc_triton.sharded import is_sharded, place_gradients, placed_alike
from agc_triton.sparse import check_sparse_rows
from agc_triton.units import UnitDim, dims_and_parts, unit_axes

# What norms in fp32 can be compared with.
LARGEST = torch.finfo(torch.float32).max


def check_options(options: Mapping[str, Any], index: int | None = None) -> None:
    """Check ``clipping``, ``agc_eps`` and ``unit_dim``, of the parameter group of this index.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """
    clipping, agc_eps, unit_dim = options["clipping"], options["agc_eps"], options["unit_dim"]
    where = "" if index is None else f" in parameter group {index}"
    if clipping is not None and not _is_real(clipping):
        raise TypeError(f"clipping must be a float or None, not {type(clipping).__name__}{where}")
    if clipping is not None and not clipping >= 0.0:
        raise ValueError(
            f"Invalid clipping value: {clipping}{where}; it must be >= 0 (0 or None: no clipping)"
        )
    if not _is_real(agc_eps):
        raise TypeError(f"agc_eps must be a float, not {type(agc_eps).__name__}{where}")
    if clipping is not None and LARGEST < clipping < math.inf:
        raise ValueError(
            f"Invalid clipping value: {clipping}{where}; it must be at most {LARGEST:.2g}, or inf"
        )
    if not 0.0 <= agc_eps <= LARGEST:
        raise ValueError(
            f"Invalid agc_eps value: {agc_eps}{where}; it must be finite, >= 0 and at most"
            f" {LARGEST:.2g}"
        )
    if unit_dim is not None and unit_dim != "tensor":
        try:
            dims_and_parts(unit_dim)
        except TypeError as error:
            raise TypeError(f"{error}{where}") from None


def check_group(group: Mapping[str, Any], index: int, *, units: bool) -> None:
    """Check one parameter group's AGC options and, if needed, whether its parameters have units.

    Raises:
        TypeError: an option of the wrong type, or an FSDP1 flat parameter.
        ValueError: an option out of range.
    """
    check_options(group, index)
    for i, param in enumerate(group["params"] if units else ()):
        # A parameter without a shape yet is checked at the step of its first gradient.
        if not is_lazy(param):
            check_param(param, group["unit_dim"], group, index, i)


def check_param(
    param: Tensor, unit_dim: UnitDim, group: Mapping[str, Any], index: int, i: int
) -> None:
    """Check that a parameter, the i-th of group ``index``, has units.

    Raises:
        TypeError: an FSDP1 flat parameter.
        ValueError: ``unit_dim`` is out of range.
    """
    if _is_flat(param):
        raise TypeError(
            f"{tensor_name(group, index, i)} is flattened by FullyShardedDataParallel"
            " (FSDP1), which leaves no units to clip; use torch.distributed.fsdp.fully_shard"
            " (FSDP2) or clipping=0"
        )
    try:
        unit_axes(param.shape, unit_dim)
    except ValueError as error:
        raise ValueError(f"{error}: {tensor_name(group, index, i)}") from None


def check_gradients(group: Mapping[str, Any], index: int, work: Work) -> None:
    """Check that a group's gradients can be clipped by an optimizer.

    Raises:
        RuntimeError: one is sparse, or its device or shape is not its parameter's, or its dtype is
            not of the same kind.
    """
    for i, param in enumerate(group["params"]):
        grad = param.grad
        if grad is None:
            continue
        if grad.layout is not torch.strided and work.rule.sparse and work.nonfinite != "skip_unit":
            check_sparse_rows(param, grad, group["unit_dim"], tensor_name(group, index, i))
        elif grad.layout is not torch.strided:
            raise RuntimeError(
                f"{work.name} does not support sparse gradients, as of"
                f" {tensor_name(group, index, i)}; wrap an optimizer that does"
                f" (agc_triton.AGC(torch.optim.SparseAdam(...))), or {_UNCLIPPED[work.nonfinite]}"
            )
        check_grad(param, grad, group, index, i)


# What leaves a gradient to torch, by ``nonfinite``.
_UNCLIPPED = {
    "propagate": "set clipping=0 in its group",
    "raise": "set clipping=0 in its group",
    "skip_unit": "set clipping=0 in its group and nonfinite='propagate', as its units are looked at"
    " for NaN with clipping=0 too",
}


def check_grad(param: Tensor, grad: Tensor, group: Mapping[str, Any], index: int, i: int) -> None:
    """Check that a dense gradient can be clipped against its parameter.

    Raises:
        RuntimeError: device or shape differ, or one of both is complex, or no floating number.
    """
    remedy = "make them equal before step()"
    kinds = {(dtype.is_complex, dtype.is_floating_point) for dtype in (param.dtype, grad.dtype)}
    what = ("device", "shape") if len(kinds) == 1 else ("dtype", "device", "shape")
    _check_alike(param, grad, "the gradient's", remedy, group, index, i, what)


def bring_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Bring the gradients of DTensors to where these lie.

    Raises:
        RuntimeError: one is a plain tensor, or on another mesh.
    """
    if place_gradients(chain.from_iterable([group["params"] for group in groups])):
        return
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param.grad is not None and not placed_alike(param.grad, param):
                raise RuntimeError(
                    f"the gradient of {tensor_name(group, index, i)} is {_placed(param.grad)}, the"
                    f" parameter is {_placed(param)}; place them alike before step(), with"
                    " torch.distributed.tensor.distribute_tensor"
                )


def _placed(tensor: Any) -> str:
    if not is_sharded(tensor):
        return "a plain tensor"
    return f"a DTensor placed as {tensor.placements} on {tensor.device_mesh}"


def check_in_place(grad: Tensor, group: Mapping[str, Any], index: int, i: int) -> None:
    """Check that a strided gradient can be written to.

    Raises:
        RuntimeError: elements share memory.
    """
    if _overlaps(grad):
        raise RuntimeError(
            f"the gradient of {tensor_name(group, index, i)} has elements that share memory (it may"
            " have been expanded) and cannot be clipped in place; give it memory of its own with"
            " .clone()"
        )


def check_states(
    param: Tensor, states: Mapping[str, Any], group: Mapping[str, Any], index: int, i: int
) -> None:
    """Check that these states of a parameter can be walked in step with it.

    Raises:
        RuntimeError: dtype, device or shape differ.
    """
    remedy = "convert the state along with the parameter"
    for key, state in states.items():
        if isinstance(state, Tensor):
            _check_alike(param, state, f"{key}'s", remedy, group, index, i)


def check_shapes(
    group: Mapping[str, Any],
    index: int,
    keys: Sequence[str],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Check that the states of parameters with a gradient have their shapes.

    What updates a part of both takes them for the same part.

    Raises:
        RuntimeError: one has another shape.
    """
    for i, param in enumerate(group["params"]):
        entry = {} if param.grad is None else states.get(param, {})
        for key, shape in _misshapen(param, entry, keys):
            raise RuntimeError(
                f"{key}'s shape {shape} differs from the parameter's for"
                f" {tensor_name(group, index, i)}; resize the state along with the parameter, or"
                " start it anew with del optimizer.state[parameter]"
            )


def _check_alike(
    param: Tensor,
    other: Tensor,
    whose: str,
    remedy: str,
    group: Mapping[str, Any],
    index: int,
    i: int,
    attributes: Sequence[str] = ("dtype", "device", "shape"),
) -> None:
    for what in attributes:
        ours, theirs = getattr(param, what), getattr(other, what)
        if ours != theirs:
            raise RuntimeError(
                f"{whose} {what} ({theirs}) differs from the parameter's ({ours}) for"
                f" {tensor_name(group, index, i)}; {remedy}"
            )


def check_work(work: Work) -> None:
    """Check all groups before anything is planned for them."""
    check_planned(work, *range(len(work.groups)))


def check_planned(work: Work, *indices: int) -> None:
    """Check groups before they are planned for.

    Raises:
        RuntimeError, TypeError, ValueError: as the checks above; nothing has been changed.
    """
    for index in indices:
        group = work.groups[index]
        units = work.needs_units(group)
        check_group(group, index, units=units)
        if units:
            check_gradients(group, index, work)
        check_shapes(group, index, work.rule.kernel.states(group), work.state)


def check_loaded(
    rule: KernelRule, states: Mapping[Tensor, Mapping[str, Any]], group: dict[str, Any], index: int
) -> None:
    """Check that a step can go on from a group and states that come from a checkpoint.

    Raises:
        ValueError: an option or a state is missing, or a state's shape is not its parameter's.
    """
    try:
        rule.hyper(group)
        keys = rule.states(group)
    except KeyError as error:
        raise ValueError(
            f"the checkpoint has no option {error} in parameter group {index}; it may be of another"
            " optimizer"
        ) from None
    # SGD counts no steps, and its only state may start later than the others' do.
    needed = (*rule.scalars, *keys) if rule.scalars else ()
    for i, param in enumerate(group["params"]):
        entry = states.get(param, {})
        for key, shape in _misshapen(param, entry, keys):
            raise ValueError(
                f"{key} in the checkpoint has shape {shape}, which is not that of"
                f" {tensor_name(group, index, i)}; it may be of another model"
            )
        missing = [key for key in needed if key not in entry]
        if entry and missing:
            raise ValueError(
                f"the checkpoint has no {', '.join(missing)}, only {', '.join(entry)}, for"
                f" {tensor_name(group, index, i)}; it may be truncated, or of other options"
                " (amsgrad, momentum, centered)"
            )


def tensor_name(group: Mapping[str, Any], group_index: int, i: int) -> str:
    """How messages call the i-th parameter of a group: ``parameter 3 ('fc.weight') of ...``."""
    names = group.get("param_names")
    name = f" ({names[i]!r})" if names else ""
    return f"parameter {i}{name} of group {group_index}, shape {tuple(group['params'][i].shape)}"


def _misshapen(
    param: Tensor, entry: Mapping[str, Any], keys: Sequence[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """States whose shape is not their parameter's."""
    for key in keys:
        state = entry.get(key)
        if isinstance(state, Tensor) and state.shape != param.shape:
            yield key, tuple(state.shape)


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements lie in the same place."""
    if tensor.is_contiguous():
        return False
    reach = 0
    dims = [dim for dim in zip(tensor.stride(), tensor.shape, strict=True) if dim[1] > 1]
    for step, size in sorted(dims):
        if step == 0:
            return True
        if step <= reach:  # it lies between the elements of smaller dimensions, if not on them
            places = torch.arange(1 + sum(step * (size - 1) for step, size in dims), device="cpu")
            placed = places.as_strided(tensor.shape, tensor.stride())
            return len(set(placed.flatten().tolist())) < tensor.numel()
        reach += step * (size - 1)
    return False


def _is_flat(param: Tensor) -> bool:
    """Whether FSDP1 flattened it."""
    return getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False)


def _is_real(value: object) -> bool:
    """Whether it is a plain number: bool and Tensor (a host sync on each step) are not."""
    return isinstance(value, (int, float)) and not isinstance(value, (bool, torch.Tensor))
