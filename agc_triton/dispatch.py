"""Which backend, and why: the only file that knows whether Triton kernels can be used."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterable

from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


def check_backend(backend: str) -> None:
    """Check the ``backend`` argument.

    Raises:
        ValueError: not one of ``BACKENDS``.
        RuntimeError: ``"triton"`` where the kernels cannot be imported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Invalid backend: {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "triton" and (reason := kernels_missing()):
        raise RuntimeError(f"backend='triton' cannot be used: {reason}; use backend='torch'")


@functools.cache
def kernels_missing() -> str | None:
    """Why the Triton kernels cannot be used in this process, or None."""
    for module in ("triton", "agc_triton.kernels"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} cannot be imported ({error})"
    return None


def choose(backend: str, params: Iterable[Tensor]) -> str:
    """The backend for these parameters; says once why CUDA parameters take the torch path."""
    if backend == "auto" and any(p.is_cuda for p in params) and (reason := kernels_missing()):
        _warn_once(f"CUDA parameters take the torch path: {reason}")
    return "torch"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
