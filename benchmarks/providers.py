"""The implementations that are compared, each with the source it follows.

timm, pytorch_optimizer and heavyball are used as packages where they are installed. torch-optimi
clips nothing, so that there is no row of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from agc_triton import AGC, SGD_AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC
from benchmarks.timing import Step
from benchmarks.version import our_version

Clip = Callable[[Iterable[Tensor]], object]
Role = Literal["ours", "wrapper", "peer", "unclipped", "copy"]


class Provider(NamedTuple):
    """One implementation of clip-and-update.

    ``build(params)`` returns a function that makes one step with the gradients in ``.grad``.
    ``role``: ours is compared with peers; unclipped, torch.optim alone, is what AGC adds to; copy
    moves as many bytes and computes nothing.
    ``quick``: among the few that a short run measures.
    """

    implementation: str
    version: str
    role: Role
    quick: bool
    build: Callable[[list[Tensor]], Step]


class Optimizer(NamedTuple):
    """A torch.optim class, its AGC class, and the options that both are measured with.

    ``states`` counts the state tensors per parameter. ``modes`` are the arguments that choose
    torch's implementation; ``fastest`` is the mode that short runs keep.
    """

    torch_class: Callable[..., torch.optim.Optimizer]
    agc_class: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    states: int
    modes: dict[str, dict[str, bool]]
    fastest: str


LR = 1e-9  # so small that weights, and so the share of clipped units, stay what they were
UNFUSED = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
MODES = {**UNFUSED, "fused": {"fused": True}}
LEAST_COPIED = 256 << 20
AGC_OPTIMS = "agc_optims 0.0.2, corrected"
MOMENTUM = {"lr": LR, "momentum": 0.9}

OPTIMIZERS = {
    "sgd": Optimizer(torch.optim.SGD, SGD_AGC, MOMENTUM.copy(), 1, MODES, "fused"),
    "adam": Optimizer(torch.optim.Adam, Adam_AGC, {"lr": LR}, 2, MODES, "fused"),
    "adamw": Optimizer(torch.optim.AdamW, AdamW_AGC, {"lr": LR}, 2, MODES, "fused"),
    "rmsprop": Optimizer(torch.optim.RMSprop, RMSprop_AGC, MOMENTUM.copy(), 2, UNFUSED, "for-loop"),
}


def providers(
    optimizer: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[Provider]:
    """Everything that is compared for one optimizer; ``compiled``: also under torch.compile."""
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
    for package, package_version, packaged in packaged_clips(compiled):
        name, build = f"{package}, torch.optim {fastest}", partial(peer, packaged, fastest)
        compared.append(Provider(name, package_version, "peer", False, build))
    algorithms = {"timm": (clip, clip_version), "agc_optims": (agc_optims_clip, AGC_OPTIMS)}
    for algorithm, (clip, clip_version) in algorithms.items() if compiled else ():
        name, build = f"{algorithm} AGC, torch.optim, torch.compile", partial(compiled_peer, clip)
        compared.append(Provider(name, clip_version, "peer", True, build))

    for mode in ["fused"] if "fused" in modes else modes:
        name, build = f"torch.optim {mode}, unclipped", partial(unclipped, mode)
        compared.append(Provider(name, torch_version, "unclipped", mode == fastest, build))
    return compared


def copy_provider(optimizer: str) -> Provider:
    """A copy that loads and stores as many bytes as a step must: what memory allows."""

    def build(params: list[Tensor]) -> Step:
        half = minimal_bytes(optimizer, params) // 2
        words = -(-copied_at_once(2 * half) // 16)
        # Words, because torch copies single bytes more slowly; the last few are what is left. One
        # tensor of both would put them at addresses that hinder each other in a CPU's caches.
        to, source = (
            torch.ones(words, dtype=torch.int64, device=params[0].device) for _ in range(2)
        )
        whole, rest = divmod(half, 8 * words)
        pieces = [(to, source)] * whole + [(to[: rest // 8], source[: rest // 8])]
        last = slice(rest // 8 * 8, rest)
        pieces.append((to.view(torch.uint8)[last], source.view(torch.uint8)[last]))
        pieces = [piece for piece in pieces if piece[0].numel()]

        def step() -> None:
            for to, source in pieces:
                to.copy_(source)

        return step

    return Provider("copy of as many bytes", f"torch {torch.__version__}", "copy", True, build)


def copied_at_once(moved: int) -> int:
    """Bytes of both buffers of a copy: far more than caches hold, and little for large models."""
    return min(moved, max(moved // 4, LEAST_COPIED))


def minimal_bytes(optimizer: str, params: Iterable[Tensor]) -> int:
    """Bytes of a step that reads p, g and states once and writes p and states once."""
    size = sum(p.numel() * p.element_size() for p in params)
    return size * (3 + 2 * OPTIMIZERS[optimizer].states)


def state_bytes(optimizer: str, params: Sequence[Tensor]) -> int:
    """Bytes that torch's class keeps in its state."""
    one: list[Tensor] = [Parameter(torch.zeros(1))]
    one[0].grad = torch.zeros(1)
    torch_class, _, options, states, *_ = OPTIMIZERS[optimizer]
    base = torch_class(one, **options)
    base.step()
    counts = sum(state.nbytes for state in base.state[one[0]].values() if not state.dim())
    return sum(states * p.nbytes + counts for p in params)


def timm_adaptive_clip_grad() -> tuple[Clip, str]:
    """timm's own function where timm is installed, else the one below, and which one it is."""
    agc = _imported("timm.utils.agc")
    if agc is None:
        return adaptive_clip_grad, "timm/utils/agc.py at 15d1dbc, rewritten"
    return agc.adaptive_clip_grad, f"timm {_imported('timm').__version__}"


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


def packaged_clips(compiled: bool) -> list[tuple[str, str, Clip]]:
    """Name, version and clipping of installed packages; heavyball's compiles itself."""
    found: list[tuple[str, str, Clip]] = []
    agc = _imported("pytorch_optimizer.optimizer.agc")
    if agc is not None:

        @torch.no_grad()
        def clip_each(parameters: Iterable[Tensor]) -> None:
            for p in parameters:
                if p.grad is not None:
                    p.grad.copy_(agc.agc(p, p.grad))

        found.append(("pytorch_optimizer agc", _version("pytorch-optimizer"), clip_each))
    utils = _imported("heavyball.utils") if compiled else None
    if utils is not None:

        @torch.no_grad()
        def clip_tensors(parameters: Iterable[Tensor]) -> None:
            params = list(parameters)
            utils.adaptive_gradient_clipping_(params, [p.grad for p in params], 0.01)

        found.append(("heavyball AGC per tensor", _version("heavyball"), clip_tensors))
    return found


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
    except Exception as error:  # timm with a torchvision that was built for another torch
        warnings.warn(f"{module} is installed but left out: {error}", stacklevel=2)
        return None


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
