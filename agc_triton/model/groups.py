"""param_groups: which parameters of a model are clipped and decayed, and their unit_dim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from agc_triton.model.entries import Entry, entries_of, show_sharded
from agc_triton.model.given import Given, read_groups
from agc_triton.model.head import Inputs, find_head
from agc_triton.model.layers import decays, names_not_decayed, unit_dim_of
from agc_triton.model.selection import Selector, select, within
from agc_triton.units import UnitDim


def param_groups(
    model: nn.Module,
    *,
    groups: Iterable[Mapping[str, Any]] | None = None,
    clipping: float | None = None,
    agc_eps: float | None = None,
    weight_decay: float | None = None,
    no_decay: Selector | Iterable[Selector] | None = (),
    exclude: Selector | Iterable[Selector] | None = (),
    units: Mapping[Any, UnitDim] | None = None,
    exclude_head: bool = True,
    example_inputs: Inputs | None = None,
    names: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of a model, ready for any optimizer of this package or `AGC` around another.

    ``unit_dim`` follows the layer type: 1 for ConvTransposeNd, which stores (in, out, ...), and
    ((0, groups), 1) where it has groups, unless it is depthwise; 1 for transformers' Conv1D; 0 for
    all others. Biases, gains, scalars, norms and what the model's own ``no_weight_decay()`` names,
    in timm, are not decayed. Parameters may have any shape and dtype; shared ones appear once,
    frozen ones not at all. Names are those of the model inside DistributedDataParallel and
    torch.compile; what `fully_shard` has gathered is sharded again.

    Args:
        model: any module; its parameters must be initialized.
        groups: groups of its parameters that exist already, as dicts (timm's layer-wise lr decay,
            transformers' Trainer, your own). They keep all their options, weight decay among them,
            and are split only where parameters differ in ``unit_dim`` or are not clipped.
        clipping, agc_eps, weight_decay: for the groups they apply to; None leaves them to the
            optimizer's own arguments.
        no_decay: what is not decayed either, as ``exclude``.
        exclude: what is not clipped, one or several of: a pattern (fnmatch) for names of parameters
            or modules, a module of the model, a module type, or a callable
            ``(name, parameter) -> bool``.
        units: ``unit_dim`` of what such a pattern, module, type or callable matches; the last that
            matches holds.
        exclude_head: leave the classifier head unclipped, as Brock et al. 2021 (arXiv 2102.06171,
            section 4.1) do. The head is ``model.get_classifier()`` or
            ``model.get_output_embeddings()`` if there is one, else the last Linear that runs on
            ``example_inputs``, else a layer with a usual name (fc, head, classifier, ...), else
            what transformers put beside the base model, else the head of the only module that the
            model holds, else the only Linear, else the last Linear that torch.fx sees.
        example_inputs: what the model takes, to find the head by running it in eval mode: a tensor,
            a tuple of arguments or a mapping of keyword arguments.
        names: give the groups ``param_names``. torch.optim refuses to add groups of bare parameters
            to named ones, which this package's optimizers do not.

    Returns:
        Groups with ``params``, ``param_names`` unless ``names`` is False, ``unit_dim`` and the
        options set for them.

    Raises:
        TypeError: something is not a model, group or selector.
        ValueError: a selector that matches nothing, a head that cannot be told, an uninitialized
            parameter, a misspelt option of a group, or nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups takes the model itself, not {type(model).__name__}: param_groups(model);"
            " parameters or groups of it go to groups=[{'params': ...}, ...]"
        )
    if groups is not None and not (weight_decay is None and no_decay in (None, (), [])):
        raise ValueError(
            "groups keep the weight decay they have: leave out weight_decay and no_decay, or groups"
        )
    show_sharded(model)
    entries = entries_of(model)
    given = [_trained(entries, model)] if groups is None else read_groups(groups, entries, model)
    members = [entry for _, named in given for _, entry in named]
    _check_initialized(members)
    own: dict[int, dict[str, Any]] = {id(entry.param): {} for entry in members}
    for selector, unit_dim in _checked_units(units).items():
        for key in select(members, [selector], "units"):
            own[key]["unit_dim"] = unit_dim
    unclipped = select(members, exclude, "exclude")
    if exclude_head:
        unclipped |= within(members, find_head(model, example_inputs))
    for key in unclipped:
        own[key]["clipping"] = 0.0
    if groups is None:
        for key in select(members, no_decay, "no_decay") | _undecayed(members, model):
            own[key]["weight_decay"] = 0.0
    options = {"clipping": clipping, "agc_eps": agc_eps, "weight_decay": weight_decay}
    return _split(given, {k: v for k, v in options.items() if v is not None}, own, names)


def _trained(entries: Sequence[Entry], model: nn.Module) -> Given:
    trained = [(entry.names[0], entry) for entry in entries if entry.param.requires_grad]
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return {}, trained


def _check_initialized(entries: Iterable[Entry]) -> None:
    for entry in entries:
        if is_lazy(entry.param):
            raise ValueError(
                f"{entry.names[0]!r} is uninitialized; run the model once before param_groups()"
            )


def _checked_units(units: Mapping[Any, UnitDim] | None) -> Mapping[Any, UnitDim]:
    if units is None or isinstance(units, Mapping):
        return units or {}
    raise TypeError(
        "units takes a mapping from patterns, modules, module types or callables to unit_dim, not"
        f" {units!r:.60}"
    )


def _undecayed(entries: Sequence[Entry], model: nn.Module) -> set[int]:
    named = names_not_decayed(model)
    return {
        id(entry.param)
        for entry in entries
        if not decays(entry) or any(fnmatchcase(n, p) for n in entry.names for p in named)
    }


def _split(
    given: Sequence[Given],
    options: Mapping[str, Any],
    own: Mapping[int, Mapping[str, Any]],
    names: bool,
) -> list[dict[str, Any]]:
    """Groups of equal options: a parameter's own before its group's before those for all."""
    result: list[dict[str, Any]] = []
    for group_options, members in given:
        parts: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, entry in members:
            everyone = {**options, "unit_dim": unit_dim_of(entry)}
            merged = {**everyone, **group_options, **own[id(entry.param)]}
            key = (merged.get("clipping"), merged.get("weight_decay"), repr(merged["unit_dim"]))
            part = parts.setdefault(key, {"params": [], "param_names": [], **merged})
            part["params"].append(entry.param)
            part["param_names"].append(name)
        result.extend(parts.values())
    if not names:
        for part in result:
            del part["param_names"]
    return result
