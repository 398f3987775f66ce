"""param_groups: which parameters of a model are clipped and decayed, and their unit_dim."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from agc_triton.model.head import Inputs, find_head
from agc_triton.units import UnitDim, unit_axes

Exclusion = str | nn.Module | type[nn.Module] | Callable[[str, Tensor], bool]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class _Entry:
    """A parameter, every name it has and all modules around it under any of them.

    ``layer`` and ``tensor`` (such as "weight") say what it is under the first name; ``paths`` are
    the names and those of all modules around them: what patterns are matched with.
    """

    param: nn.Parameter
    layer: nn.Module
    tensor: str
    names: list[str]
    around: list[nn.Module]

    @property
    def paths(self) -> list[str]:
        return [name.rsplit(".", n)[0] for name in self.names for n in range(name.count(".") + 1)]


def param_groups(
    model: nn.Module,
    *,
    clipping: float | None = None,
    agc_eps: float | None = None,
    weight_decay: float | None = None,
    exclude: Exclusion | Iterable[Exclusion] | None = (),
    exclude_head: bool = True,
    example_inputs: Inputs | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model, ready for any optimizer of this package or `AGC` around another.

    ``unit_dim`` follows the layer type: 1 for ConvTransposeNd, which stores (in, out, ...),
    ((0, groups), 1) where it has groups, 0 where it is depthwise and for all other layers. Biases,
    gains, scalars and normalization layers are not decayed. Shared parameters appear once, frozen
    ones not at all.

    Args:
        model: any module; its parameters must be initialized.
        clipping, agc_eps, weight_decay: for the groups they apply to; None leaves them to the
            optimizer's own arguments.
        exclude: what is not clipped, one or several of: a pattern (fnmatch) for names of parameters
            or modules, a module of the model, a module type, or a callable
            ``(name, parameter) -> bool``.
        exclude_head: leave the classifier head unclipped, as Brock et al. 2021 (arXiv 2102.06171,
            section 4.1) do. The head is ``model.get_classifier()`` if there is one, else the last
            Linear that runs on ``example_inputs``, else a layer with a usual name (fc, head,
            classifier, ...), else the only Linear, else the last Linear that torch.fx sees.
        example_inputs: what the model takes, to find the head by running it in eval mode: a tensor,
            a tuple of arguments or a mapping of keyword arguments.

    Returns:
        Groups with ``params``, ``param_names``, ``unit_dim`` and the options set for them.

    Raises:
        TypeError: an exclusion that is none of these.
        ValueError: an exclusion that matches nothing, a head that cannot be told, an uninitialized
            parameter, or nothing to train.
    """
    entries = _entries(model)
    unclipped = _excluded(entries, _as_list(exclude))
    if exclude_head:
        unclipped |= {
            id(p) for module in find_head(model, example_inputs) for p in module.parameters()
        }
    given = {"clipping": clipping, "agc_eps": agc_eps, "weight_decay": weight_decay}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in entries:
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        options["unit_dim"] = _unit_dim(entry)
        if id(entry.param) in unclipped:
            options["clipping"] = 0.0
        if not _decays(entry):
            options["weight_decay"] = 0.0
        key = tuple(sorted(options.items()))
        group = groups.setdefault(key, {"params": [], "param_names": [], **options})
        group["params"].append(entry.param)
        group["param_names"].append(entry.names[0])
    return list(groups.values())


def _entries(model: nn.Module) -> list[_Entry]:
    modules = dict(model.named_modules(remove_duplicate=False))
    entries: dict[int, _Entry] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if not param.requires_grad:
            continue
        if is_lazy(param):
            raise ValueError(f"{name!r} is uninitialized; run the model once before param_groups()")
        path, _, tensor = name.rpartition(".")
        # A parametrized tensor lies at LAYER.parametrizations.TENSOR.original.
        layer_path, _, parametrized = f".{path}".partition(".parametrizations.")
        layer, tensor = modules[layer_path[1:]], parametrized or tensor
        entry = entries.setdefault(id(param), _Entry(param, layer, tensor, [], []))
        entry.names.append(name)
        parts = path.split(".") if path else []
        entry.around.extend(modules[".".join(parts[:n])] for n in range(len(parts) + 1))
    if not entries:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return list(entries.values())


def _unit_dim(entry: _Entry) -> UnitDim:
    """By layer type; None for the default."""
    layer, shape = entry.layer, entry.param.shape
    if not unit_axes(shape, None) or not isinstance(layer, _ConvTransposeNd):
        return None
    if layer.groups == layer.in_channels == layer.out_channels:
        return None
    return 1 if layer.groups == 1 else ((0, layer.groups), 1)


def _decays(entry: _Entry) -> bool:
    is_gain = not unit_axes(entry.param.shape, None)
    return not ("bias" in entry.tensor or is_gain or isinstance(entry.layer, _NORMS))


def _as_list(exclude: Any) -> list[Exclusion]:
    if exclude is None:
        return []
    one = isinstance(exclude, str) or callable(exclude) or not isinstance(exclude, Iterable)
    exclusions = [exclude] if one else list(exclude)
    for exclusion in exclusions:
        if not (isinstance(exclusion, str) or callable(exclusion)):
            raise TypeError(
                f"exclude takes patterns, modules, module types and callables (name, parameter) ->"
                f" bool, not {exclusion!r:.60}"
            )
    return exclusions


def _excluded(entries: list[_Entry], exclude: list[Exclusion]) -> set[int]:
    """Ids of the parameters that the exclusions name."""
    excluded: set[int] = set()
    for exclusion in exclude:
        found = {id(entry.param) for entry in entries if _matches(entry, exclusion)}
        if not found and isinstance(exclusion, (str, type, nn.Module)):
            raise ValueError(_no_match(entries, exclusion))
        excluded |= found
    return excluded


def _matches(entry: _Entry, exclusion: Exclusion) -> bool:
    if isinstance(exclusion, str):
        return any(fnmatch.fnmatchcase(path, exclusion) for path in entry.paths)
    if isinstance(exclusion, type):
        return any(isinstance(module, exclusion) for module in entry.around)
    if isinstance(exclusion, nn.Module):  # to be called is what it is for
        return any(module is exclusion for module in entry.around)
    return any(exclusion(name, entry.param) for name in entry.names)


def _no_match(entries: list[_Entry], exclusion: str | type | nn.Module) -> str:
    if isinstance(exclusion, nn.Module):
        return (
            f"exclude has a {type(exclusion).__name__} that is no module of this model with"
            " trainable parameters; name it by a pattern if the model is a copy"
        )
    if isinstance(exclusion, type):
        types = sorted({type(m).__name__ for entry in entries for m in entry.around})
        return (
            f"exclude={exclusion.__name__} matches no module with trainable parameters;"
            f" there are: {', '.join(types)}"
        )
    paths = list(dict.fromkeys(path for entry in entries for path in entry.paths))
    near = difflib.get_close_matches(exclusion, paths, n=5, cutoff=0.0)
    return (
        f"exclude={exclusion!r} matches no trainable parameter or module with one; near names:"
        f" {', '.join(near)}"
    )
