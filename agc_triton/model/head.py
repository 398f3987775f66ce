"""Finding a model's classifier head, which adaptive gradient clipping leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

# What a forward pass takes: a tensor, a tuple of arguments or a mapping of keyword arguments.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_HEAD_NAMES = {"classifier", "fc", "head", "heads", "last_linear", "lm_head", "logits", "score"}


def find_head(model: nn.Module, example_inputs: Inputs | None = None) -> list[nn.Module]:
    """The classifier head's modules; empty if the model has no Linear layer.

    In this order: ``model.get_classifier()``, the last Linear run on ``example_inputs``, the last
    Linear or Conv under a usual name at the top of the model, the only Linear, the last Linear that
    torch.fx traces.

    Raises:
        ValueError: there are Linear layers and none of these tells which is the head.
    """
    model = _unwrapped(model)
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        found = get_classifier()
        found = found if isinstance(found, (list, tuple)) else [found]
        return [module for module in found if isinstance(module, nn.Module)]
    linears = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if example_inputs is not None:
        return _run(model, list(linears), example_inputs)[-1:]
    if named := _by_name(model):
        return named
    if len(linears) < 2:
        return list(linears)
    if traced := _trace(model):
        return traced
    raise ValueError(
        f"cannot tell which of {type(model).__name__}'s {len(linears)} Linear layers is the"
        f" classifier head (the last ones by name: {', '.join(list(linears.values())[-3:])});"
        " pass example_inputs to run the model, or exclude_head=False and exclude=[...]"
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile, in any order."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _run(model: nn.Module, linears: list[nn.Linear], example_inputs: Inputs) -> list[nn.Module]:
    """Linears in the order in which a forward pass in eval mode runs them."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, _args: Any, _output: Any) -> None:
        ran.append(module)

    handles = [linear.register_forward_hook(note) for linear in linears]
    training = [module for module in model.modules() if module.training]
    args: Any = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    args, kwargs = ((), args) if isinstance(args, Mapping) else (args, {})
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return ran


def _by_name(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        top = name.partition(".")[0]
        if top in _HEAD_NAMES and isinstance(module, (nn.Linear, _ConvNd)):
            found = [module]
    return found


def _trace(model: nn.Module) -> list[nn.Module]:
    # A copy, as what forward() stores would be torch.fx's stand-ins; parameters stay as they are.
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    try:
        nodes = fx.Tracer().trace(copy.deepcopy(model, shared)).nodes
    except Exception:  # a model that cannot be copied or traced raises whatever its code raises
        return []
    called: list[nn.Module] = [
        model.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"
    ]
    linears: list[nn.Module] = [m for m in called if isinstance(m, nn.Linear)]
    return linears[-1:]
