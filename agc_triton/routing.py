"""Which path steps a parameter, and why; kernels are imported here, on need."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from agc_triton.rule import Work
from agc_triton.sharded import Kind, layout_here, local
from agc_triton.units import PLAIN, has_units, memory_order
from agc_triton.validation import tensor_name

BACKENDS = ("auto", "triton", "torch")

# The first release whose tuples the kernels can be written with.
TRITON_NEEDED = (3, 6)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Packages whose frames lie between a warning and the user's line.
WITHIN = ("agc_triton", "torch")


def check_backend(backend: str) -> None:
    """Check the ``backend`` argument.

    Raises:
        ValueError: not one of ``BACKENDS``.
        RuntimeError: ``"triton"`` where the kernels cannot be used.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Invalid backend: {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "triton" and (reason := kernels_missing()):
        needed = ".".join(map(str, TRITON_NEEDED))
        raise RuntimeError(
            f"backend='triton' cannot be used: {reason}; install triton {needed} or later, which"
            " comes with PyTorch 2.11 and later, or use backend='torch'"
        )


@functools.cache
def kernels_missing() -> str | None:
    """Why the Triton kernels cannot be used in this process, or None."""
    try:
        # Builds for other platforms have distributions of other names.
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < TRITON_NEEDED:
            return f"triton {version} is older than {'.'.join(map(str, TRITON_NEEDED))}"
        importlib.import_module("agc_triton.kernels.step")
    except (ImportError, ValueError) as error:
        return f"the kernels cannot be imported ({error})"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    from triton.runtime import JITFunction

    from agc_triton.kernels.step import step

    return not isinstance(step, JITFunction)


def asks_for_torch(group: Mapping[str, Any]) -> str | None:
    """The option of a group that means the torch path, or None."""
    for option, value in (("foreach", True), ("differentiable", True), ("fused", False)):
        given = group.get(option)
        if given is not None and bool(given) is value:
            return f"{option}={given}"
    return None


def check_group_backend(backend: str, group: Mapping[str, Any], index: int) -> None:
    """Check that a group does not ask for the torch path together with ``backend="triton"``.

    Raises:
        ValueError: it does.
    """
    option = asks_for_torch(group)
    if backend == "triton" and option:
        raise ValueError(
            f"{option} in parameter group {index} means the torch path and cannot be used with"
            " backend='triton'; leave out one of them"
        )


def reasons(work: Work, index: int) -> list[str | None]:
    """Why each parameter of a group takes the torch path, or None if the kernels take it.

    What the user asked for comes back as written: ``"torch"`` or, for example, ``"foreach=True"``.
    """
    group = work.groups[index]
    found = [_why_torch(work, group, param) for param in group["params"]]
    if len(set(map(id, group["params"]))) < len(found):  # programs would update it at once
        found = [reason or "a parameter is in its group twice" for reason in found]
    return found


def _why_torch(work: Work, group: Mapping[str, Any], param: Tensor) -> str | None:
    backend = work.backend
    if backend == "torch":
        return backend
    if option := asks_for_torch(group):
        return option
    if is_lazy(param):
        return "it has no shape yet"
    whole, grad = param, param.grad
    if work.kind_of(param, group) is not Kind.OTHER:
        param = local(param)
    if param.numel() == 0:
        return "it is empty"
    if not param.is_cuda and (backend == "auto" or not interpreted()):
        return f"it is on {param.device}, and Triton needs a GPU"
    if missing := kernels_missing():
        return missing
    if type(param) not in PLAIN:
        return f"a {type(param).__name__} is not a plain tensor"
    if param.dtype.to_real() not in DTYPES:
        return f"its dtype is {param.dtype}"
    if memory_order(param) is None:
        return "it is not dense in memory"
    if param.is_conj() or param.is_neg():
        return "it is a view that conjugates or negates"
    if not has_units(whole.shape, group["unit_dim"]):
        # With clipping it is refused.
        return None if group["clipping"] else f"unit_dim={group['unit_dim']} is out of range"
    if layout_here(whole, group["unit_dim"]) is None:
        return f"its units (unit_dim={group['unit_dim']}) are scattered in memory"
    if grad is not None and grad.layout is not torch.strided:
        return "its gradient is sparse"
    if grad is not None and grad.dtype.to_real() not in DTYPES:
        return f"its gradient's dtype is {grad.dtype}"
    return None


def may_use_triton(backend: str, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the kernels could step parameters of these groups, and none asks for the torch path.

    What they are to be stepped with together is seen at the step.
    """
    wanted = any(wants_triton(backend, group) for group in groups)
    return wanted and not any(map(asks_for_torch, groups)) and kernels_missing() is None


def wants_triton(backend: str, group: Mapping[str, Any]) -> bool:
    """Whether a group's parameters are to be looked at for the kernels."""
    if backend == "auto":
        return any(param.is_cuda for param in group["params"])
    return backend == "triton"


def eligible(work: Work, index: int) -> list[Tensor]:
    """The parameters of a group that the kernels take.

    Raises:
        RuntimeError: ``backend="triton"`` and one that they cannot take.
    """
    backend, group = work.backend, work.groups[index]
    if not wants_triton(backend, group):
        return []
    taken = []
    pairs = zip(group["params"], reasons(work, index), strict=True)
    for i, (param, reason) in enumerate(pairs):
        if reason is None:
            taken.append(param)
        elif is_lazy(param) or local(param).numel() == 0:
            continue
        elif backend == "triton":
            name = tensor_name(group, index, i)
            raise RuntimeError(
                f"backend='triton' cannot step {name}: {reason}; change that, or use"
                " backend='auto', which steps it on the torch path"
            )
        elif param.is_cuda and reason not in (backend, asks_for_torch(group)):
            _warn_once(reason, tensor_name(group, index, i))
    return taken


_warned: set[str] = set()


def _warn_once(reason: str, name: str) -> None:
    """Warn at the line outside this package and torch that the step comes from."""
    if reason in _warned:
        return
    _warned.add(reason)
    message = (
        f"{name} is on a GPU and takes the torch path, which is slower: {reason}. Others may do so"
        " for the same reason, which optimizer.explain() counts; foreach=True in their group, or"
        " backend='torch' for all, says that this is meant"
    )
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals["__name__"].split(".")[0] in WITHIN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
