"""The implementations that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agc_triton import AGC
from benchmarks.lib.optimizers import OPTIMIZERS, UNFUSED
from benchmarks.lib.patience import Patience
from benchmarks.lib.peers import (
    AGC_OPTIMS,
    Clip,
    agc_optims_clip,
    packaged_clips,
    timm_adaptive_clip_grad,
)
from benchmarks.lib.timing import Step
from benchmarks.lib.versions import our_version

ALGORITHMS = ("timm", "agc_optims")  # those that can be compiled
Role = Literal["ours", "wrapper", "peer", "unclipped", "copy"]


class Provider(NamedTuple):
    """One implementation of clip-and-update.

    ``build(params)`` returns a function that makes one step with the gradients in ``.grad``.
    ``role``: ours is compared with peers; unclipped, torch.optim alone, is what AGC adds to; copy
    moves as many bytes and computes nothing.
    ``quick``: among the few that a short run measures. ``patience``: its first steps compile and
    may take so long.
    """

    implementation: str
    version: str
    role: Role
    quick: bool
    build: Callable[[list[Tensor]], Step]
    patience: Patience | None = None


def providers(
    optimizer: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: Sequence[str] = (),
    patience: Patience | None = None,
) -> list[Provider]:
    """Everything that is compared for one optimizer.

    ``compiled``: which algorithms also under torch.compile; ``patience``: how long that may take.
    """
    torch_class, agc_class, options, _, modes, fastest = OPTIMIZERS[optimizer]
    if optimizer == "sgd" and device == "cpu" and dtype.itemsize < 4:
        modes, fastest = UNFUSED, "for-loop"  # fused is wrong there up to 2.13 (pytorch#191763)
    elif device == "cuda" and "fused" not in modes:
        fastest = "foreach"
    version = f"agc_triton {our_version()}"
    torch_version = f"torch {torch.__version__}"

    def ours(backend: str, params: list[Tensor]) -> Step:
        return agc_class(params, **options, backend=backend).step

    def wrapper(params: list[Tensor]) -> Step:
        return AGC(torch_class(params, **options)).step

    def peer(clip: Clip, mode: str, params: list[Tensor]) -> Step:
        update = torch_class(params, **options, **modes[mode]).step

        def step() -> None:
            clip(params)
            update()

        return step

    def compiled_peer(clip: Clip, params: list[Tensor]) -> Step:
        # Dynamo keeps a few versions of a function, whoever's, and then runs it uncompiled.
        torch.compiler.reset()
        step = torch.compile(peer(clip, "foreach", params))
        limited: Step = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)(step)
        return limited

    def unclipped(mode: str, params: list[Tensor]) -> Step:
        return torch_class(params, **options, **modes[mode]).step

    compared = []
    if device == "cuda":
        triton = partial(ours, "triton")
        compared.append(Provider("agc_triton, Triton", version, "ours", True, triton))
    torch_path = partial(ours, "torch")
    quick = device == "cpu"
    compared.append(Provider("agc_triton, torch path", version, "ours", quick, torch_path))
    compared.append(Provider("AGC(torch.optim)", version, "wrapper", False, wrapper))

    clip, clip_version = timm_adaptive_clip_grad()
    for mode in modes:
        name, build = f"timm AGC, torch.optim {mode}", partial(peer, clip, mode)
        compared.append(Provider(name, clip_version, "peer", mode == fastest, build))
    name, build = "agc_optims AGC, torch.optim for-loop", partial(peer, agc_optims_clip, "for-loop")
    compared.append(Provider(name, AGC_OPTIMS, "peer", False, build))
    for package in packaged_clips():
        if package.compiles and not compiled:
            continue
        name, build = f"{package.name}, torch.optim {fastest}", partial(peer, package.clip, fastest)
        limit = patience if package.compiles else None
        compared.append(Provider(name, package.version, "peer", False, build, limit))
    algorithms = {"timm": (clip, clip_version), "agc_optims": (agc_optims_clip, AGC_OPTIMS)}
    for algorithm in compiled:
        clip, clip_version = algorithms[algorithm]
        name, build = f"{algorithm} AGC, torch.optim, torch.compile", partial(compiled_peer, clip)
        compared.append(Provider(name, clip_version, "peer", True, build, patience))

    for mode in ["fused"] if "fused" in modes else modes:
        name, build = f"torch.optim {mode}, unclipped", partial(unclipped, mode)
        compared.append(Provider(name, torch_version, "unclipped", mode == fastest, build))
    return compared
