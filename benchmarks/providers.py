"""The implementations that are compared, each with the source it follows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import agc_triton
from agc_triton import AGC, SGD_AGC, AdamW_AGC, RMSprop_AGC

Step = Callable[[], object]
Role = Literal["ours", "wrapper", "peer", "unclipped"]


class Provider(NamedTuple):
    """One implementation of clip-and-update.

    ``build(params)`` returns a function that makes one step with the gradients in ``.grad``.
    ``role``: ours is compared with peers; unclipped, torch.optim alone, is what AGC adds to.
    ``quick``: among the few that a short run measures.
    """

    implementation: str
    version: str
    role: Role
    quick: bool
    build: Callable[[list[Tensor]], Step]


class Optimizer(NamedTuple):
    """A torch.optim class, its AGC class, and the options that both are measured with.

    ``modes`` are the arguments that choose torch's implementation on a CPU; ``fastest`` is the mode
    that short runs keep.
    """

    torch_class: Callable[..., torch.optim.Optimizer]
    agc_class: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    modes: dict[str, dict[str, bool]]
    fastest: str


LR = 1e-6  # so small that weights, and so the share of clipped units, stay what they were
UNFUSED = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
MODES = {**UNFUSED, "fused": {"fused": True}}

OPTIMIZERS = {
    "sgd": Optimizer(torch.optim.SGD, SGD_AGC, {"lr": LR, "momentum": 0.9}, MODES, "fused"),
    "adamw": Optimizer(torch.optim.AdamW, AdamW_AGC, {"lr": LR}, MODES, "fused"),
    "rmsprop": Optimizer(
        torch.optim.RMSprop, RMSprop_AGC, {"lr": LR, "momentum": 0.9}, UNFUSED, "for-loop"
    ),
}


def providers(optimizer: str) -> list[Provider]:
    """Everything that is compared for one optimizer, on a CPU."""
    torch_class, agc_class, options, modes, fastest = OPTIMIZERS[optimizer]
    version = f"agc_triton {agc_triton.__version__}"
    clip, clip_version = timm_adaptive_clip_grad()

    def ours(params: list[Tensor]) -> Step:
        return agc_class(params, **options, backend="torch").step

    def wrapper(params: list[Tensor]) -> Step:
        return AGC(torch_class(params, **options)).step

    def peer(mode: str, params: list[Tensor]) -> Step:
        update = torch_class(params, **options, **modes[mode]).step

        def step() -> None:
            clip(params)
            update()

        return step

    def unclipped(mode: str, params: list[Tensor]) -> Step:
        return torch_class(params, **options, **modes[mode]).step

    compared = [
        Provider("agc_triton", version, "ours", True, ours),
        Provider("AGC(torch.optim)", version, "wrapper", False, wrapper),
    ]
    for mode in modes:
        name = f"timm AGC, torch.optim {mode}"
        compared.append(Provider(name, clip_version, "peer", mode == fastest, partial(peer, mode)))
    for mode in ["fused"] if "fused" in modes else modes:
        name = f"torch.optim {mode}, unclipped"
        compared.append(
            Provider(
                name,
                f"torch {torch.__version__}",
                "unclipped",
                mode == fastest,
                partial(unclipped, mode),
            )
        )
    return compared


def timm_adaptive_clip_grad() -> tuple[Callable[[Iterable[Tensor]], object], str]:
    """timm's own function where timm is installed, else the one below, and which one it is."""
    try:
        timm, agc = (importlib.import_module(name) for name in ("timm", "timm.utils.agc"))
    except ImportError:
        return adaptive_clip_grad, "timm/utils/agc.py at 15d1dbc, rewritten"
    return agc.adaptive_clip_grad, f"timm {timm.__version__}"


@torch.no_grad()
def adaptive_clip_grad(
    parameters: Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    """timm's algorithm with timm's operations, for where timm is not installed.

    One unit per index of dimension 0, also for gains shaped (C, 1, 1, 1); writes to ``.grad``.
    Source: huggingface/pytorch-image-models, timm/utils/agc.py at commit 15d1dbc.
    """
    for param in parameters:
        grad = param.grad
        if grad is None:
            continue
        max_norm = _norm(param).clamp_(min=eps).mul_(clip_factor)
        grad_norm = _norm(grad)
        clipped = grad * (max_norm / grad_norm.clamp(min=1e-6))
        grad.copy_(torch.where(grad_norm < max_norm, grad, clipped))


def _norm(x: Tensor) -> Tensor:
    dims = None if x.ndim <= 1 else tuple(range(1, x.ndim))
    norm: Tensor = x.norm(2.0, dim=dims, keepdim=dims is not None)
    return norm
