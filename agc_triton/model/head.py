"""Finding a model's classifier head, which adaptive gradient clipping leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from agc_triton.model.entries import DATA_PARALLEL, show_sharded

# What a forward pass takes: a tensor, a tuple of arguments or a mapping of keyword arguments.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

_HEAD_NAMES = {
    *("classifier", "fc", "head", "heads", "last_linear", "lm_head", "logits", "score"),
    *("classification_head", "ctc_head", "decode_head", "logits_proj", "qa_outputs"),
}
# Where a model ends in a space that it shares with another, as CLIP does.
_PROJECTION_NAMES = {f"{of}_projection" for of in ("audio", "image", "text", "vision", "visual")}


def find_head(model: nn.Module, example_inputs: Inputs | None = None) -> list[nn.Module]:
    """The classifier head's modules; empty if the model has no Linear layer.

    In this order: ``model.get_classifier()`` (timm), ``model.get_output_embeddings()``
    (transformers), the last Linear run on ``example_inputs``, the last Linear or Conv under a usual
    name at the top of the model, those that end what transformers put beside the base model, the
    head of the only module it holds, the only Linear, the last Linear that torch.fx traces.

    Raises:
        ValueError: there are Linear layers and none of these tells which is the head.
    """
    model = _unwrapped(model)
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        return _modules(get_classifier())
    get_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(get_embeddings) and (found := _modules(get_embeddings())):
        return found
    linears = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if example_inputs is not None:
        return _last_run(model, list(linears), example_inputs)
    if named := _by_name(model):
        return named
    base = _base_of(model)
    if base is not None and (beside := _beside_base(model, base)):
        return beside
    if (inner := _only_child(model)) is not None:
        return find_head(inner)
    if base is not None and linears:
        raise ValueError(
            f"{type(model).__name__} shows no head, by its get_output_embeddings() and the names of"
            " its layers: exclude_head=False is all it needs, or example_inputs if there is one"
        )
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
        if isinstance(model, DATA_PARALLEL):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _modules(found: Any) -> list[nn.Module]:
    several = found if isinstance(found, (list, tuple, nn.ModuleList)) else [found]
    return [module for module in several if isinstance(module, nn.Module)]


def _last_run(
    model: nn.Module, linears: list[nn.Linear], example_inputs: Inputs
) -> list[nn.Module]:
    """The Linear that a forward pass runs last; none if there is no Linear."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, _args: Any, _output: Any) -> None:
        ran.append(module)

    args: Any = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    args, kwargs = ((), args) if isinstance(args, Mapping) else (args, {})
    handles = [linear.register_forward_hook(note) for linear in linears]
    try:
        with _evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if linears and not ran:
        raise ValueError(
            f"none of {type(model).__name__}'s {len(linears)} Linear layers ran on example_inputs;"
            " pass inputs that reach the head, or exclude_head=False and exclude=[...]"
        )
    return ran[-1:]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards modes, and what parameters FSDP's modules show, are as before."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
        show_sharded(model)


def _by_name(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name, child in model.named_children():
        if name in _HEAD_NAMES:
            found = _last_layer(child) or found
    return found


def _base_of(model: nn.Module) -> nn.Module | None:
    """A transformers model's part without heads, which may be itself."""
    transformers = callable(getattr(model, "get_output_embeddings", None))
    base = getattr(model, "base_model", None) if transformers else None
    return base if isinstance(base, nn.Module) else None


def _only_child(model: nn.Module) -> nn.Module | None:
    """What a model, a LightningModule say, does no more than hold."""
    holding = [child for child in model.children() if any(True for _ in child.parameters())]
    alone = len(holding) == 1 and not any(True for _ in model.parameters(recurse=False))
    return holding[0] if alone else None


def _beside_base(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    """What ends each of the modules that a transformers model has beside its base model."""
    inside = set(base.modules())
    beside = [child for child in model.children() if child not in inside]
    if base is model:
        beside = [m for name, m in model.named_children() if name in _PROJECTION_NAMES]
    return [layer for child in beside for layer in _last_layer(child)]


def _last_layer(module: nn.Module) -> list[nn.Module]:
    """The last Linear or Conv, of a part with a usual name where there is one."""
    if named := _by_name(module):
        return named
    layers: list[nn.Module] = [m for m in module.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    return layers[-1:]


def _trace(model: nn.Module) -> list[nn.Module]:
    # A copy, as what forward() stores would be torch.fx's stand-ins; parameters stay as they are.
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    try:
        twin = copy.deepcopy(model, shared)
        originals = dict(zip(twin.modules(), model.modules(), strict=True))
        for module in originals:  # torch.fx does not go into what is compiled
            for name, child in module._modules.items():
                module._modules[name] = child if child is None else _unwrapped(child)
        nodes = fx.Tracer().trace(twin).nodes
    except Exception:  # a model that cannot be copied or traced raises whatever its code raises
        return []
    called = [originals[twin.get_submodule(str(n.target))] for n in nodes if n.op == "call_module"]
    linears: list[nn.Module] = [m for m in called if isinstance(m, nn.Linear)]
    return linears[-1:]
