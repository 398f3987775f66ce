"""Clipping by others, each with the source it follows.

timm, pytorch_optimizer and heavyball are used as packages where they are installed. torch-optimi
clips nothing, so that there is no row of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Clip = Callable[[Iterable[Tensor]], object]

REWRITTEN = "timm/utils/agc.py at 15d1dbc, rewritten"
AGC_OPTIMS = "agc_optims 0.0.2, corrected"


def timm_adaptive_clip_grad() -> tuple[Clip, str]:
    """timm's own function where timm is installed, else the one below, and which one it is."""
    agc = imported("timm.utils.agc")
    if agc is None:
        return adaptive_clip_grad, REWRITTEN
    return agc.adaptive_clip_grad, f"timm {imported('timm').__version__}"


def timm_clip_without_head(model: nn.Module, clipping: float) -> tuple[Callable[[], object], str]:
    """Clipping as timm's training script has it with --clip-mode agc, and which one it is."""
    body = list(model.parameters())[:-2]  # timm.models.model_parameters(model, exclude_head=True)
    utils = imported("timm.utils")
    if utils is None:
        return partial(adaptive_clip_grad, body, clipping), REWRITTEN
    clip = partial(utils.dispatch_clip_grad, body, clipping, mode="agc")
    return clip, f"timm {imported('timm').__version__}"


def adaptive_clip_grad(
    parameters: Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    """timm's algorithm with timm's operations, for where timm is not installed.

    One unit per index of dimension 0, also for gains shaped (C, 1, 1, 1); writes to ``.grad``.
    Source: huggingface/pytorch-image-models, timm/utils/agc.py at commit 15d1dbc.
    """
    _clip(parameters, _norm, clip_factor, eps)


def _norm(x: Tensor) -> Tensor:
    dims = None if x.ndim <= 1 else tuple(range(1, x.ndim))
    norm: Tensor = x.norm(2.0, dim=dims, keepdim=dims is not None)
    return norm


def agc_optims_clip(
    parameters: Iterable[Tensor], clipping: float = 0.01, eps: float = 1e-3
) -> None:
    """agc_optims' operations as the paper means them, for current PyTorch; writes to ``.grad``.

    Its ``mul_`` in place, which rescaled gradients under the limit too, is a plain product here,
    and tensors of rank 2 and 3 are reduced over all dimensions but 0, as those of rank 4 are.
    Source: agc_optims 0.0.2 (PyPI), agc_optims/utils.py.
    """
    _clip(parameters, _root_of_squares, clipping, eps)


def _root_of_squares(x: Tensor) -> Tensor:
    dims = None if x.ndim <= 1 else tuple(range(1, x.ndim))
    return torch.sum(x**2, dim=dims, keepdim=dims is not None) ** 0.5


@torch.no_grad()
def _clip(
    parameters: Iterable[Tensor], norm: Callable[[Tensor], Tensor], clipping: float, eps: float
) -> None:
    for param in parameters:
        grad = param.grad
        if grad is None:
            continue
        max_norm = norm(param).clamp_(min=eps).mul_(clipping)
        grad_norm = norm(grad)
        clipped = grad * (max_norm / grad_norm.clamp(min=1e-6))
        grad.copy_(torch.where(grad_norm < max_norm, grad, clipped))


class Package(NamedTuple):
    """Clipping by an installed package; ``compiles``: under torch.compile, by itself."""

    name: str
    version: str
    clip: Clip
    compiles: bool


def packaged_clips() -> list[Package]:
    """Those of the packages that are installed."""
    found = []
    agc = imported("pytorch_optimizer.optimizer.agc")
    if agc is not None:

        @torch.no_grad()
        def clip_each(parameters: Iterable[Tensor]) -> None:
            for p in parameters:
                if p.grad is not None:
                    p.grad.copy_(agc.agc(p, p.grad))

        version = _version("pytorch-optimizer")
        found.append(Package("pytorch_optimizer agc", version, clip_each, False))
    utils = imported("heavyball.utils")
    if utils is not None:

        @torch.no_grad()
        def clip_tensors(parameters: Iterable[Tensor]) -> None:
            params = list(parameters)
            utils.adaptive_gradient_clipping_(params, [p.grad for p in params], 0.01)

        version = _version("heavyball")
        found.append(Package("heavyball AGC per tensor", version, clip_tensors, True))
    return found


def imported(module: str) -> Any:
    """The module, or None where it is not installed or does not work."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
    except Exception as error:  # timm with a torchvision that was built for another torch
        warnings.warn(f"{module} is installed but left out: {error}", stacklevel=2)
        return None


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
