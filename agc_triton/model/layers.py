"""What a parameter's layer and name in it say: its unit_dim, and whether it decays."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from agc_triton.model.entries import Entry, named_chains
from agc_triton.units import UnitDim

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WITH_WEIGHTS = (
    *(_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)
# Layers of other packages, such as torchvision's DeformConv2d or transformers' LlamaRMSNorm.
_NAMED_FOR_WEIGHTS = re.compile(r"linear|conv|embedding", re.IGNORECASE)
_CONV1D = re.compile(r"^Conv1D$")
_NAMED_FOR_NORM = re.compile(r"norm(\dd)?$", re.IGNORECASE)


def unit_dim_of(entry: Entry) -> UnitDim:
    """By layer type; None for the default."""
    layer = entry.layer
    if _is_one_unit(entry) or not _is_weight(entry):
        return None
    if isinstance(layer, _ConvTransposeNd):
        if layer.groups == layer.in_channels == layer.out_channels:
            return None
        return 1 if layer.groups == 1 else ((0, layer.groups), 1)
    return 1 if _is_transformers_conv1d(layer) else None


def decays(entry: Entry) -> bool:
    """Whether it is a weight, and no bias, gain, scalar or part of a norm.

    A shape tells only where the layer does not: one input or output channel makes no gain.
    """
    if "bias" in entry.tensor or isinstance(entry.layer, _NORMS):
        return False
    if _is_weight(entry):
        return True
    return not (_is_one_unit(entry) or _is_named(entry.layer, _NAMED_FOR_NORM))


def names_not_decayed(model: nn.Module) -> set[str]:
    """What `no_weight_decay()` of the model or any module in it names: patterns, as timm has it."""
    patterns: set[str] = set()
    for name, chain in named_chains(model):
        listed = getattr(chain[-1], "no_weight_decay", None)
        if callable(listed):
            patterns.update(f"{name}.{pattern}" if name else pattern for pattern in listed())
    return patterns


def _is_weight(entry: Entry) -> bool:
    """Whether the layer is known to have weights and this is one: no gain of weight norm, say."""
    layer, tensor = entry.layer, entry.tensor
    if not (isinstance(layer, _WITH_WEIGHTS) or _is_named(layer, _NAMED_FOR_WEIGHTS)):
        return False
    whole = "weight" in tensor and "." not in tensor and not tensor.endswith("_g")
    return whole and entry.param.dim() > 1


def _is_named(layer: nn.Module, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(cls.__name__) for cls in type(layer).__mro__)


def _is_one_unit(entry: Entry) -> bool:
    """Whether its shape is that of a scalar, a bias or a gain such as (C, 1, 1, 1)."""
    return sum(size != 1 for size in entry.param.shape) <= 1


def _is_transformers_conv1d(layer: nn.Module) -> bool:
    """GPT-2's Linear, stored (in, out), told without importing transformers."""
    return hasattr(layer, "nf") and _is_named(layer, _CONV1D)
