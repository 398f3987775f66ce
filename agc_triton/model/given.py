"""Groups that somebody else made: what is in them, as parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from agc_triton.model.entries import Entry
from agc_triton.options import check_spelling

# A group's options without params and names; its parameters, each with its name in the group.
Given = tuple[dict[str, Any], list[tuple[str, Entry]]]


def read_groups(
    groups: Iterable[Mapping[str, Any]], entries: Sequence[Entry], model: nn.Module
) -> list[Given]:
    """What torch.optim would read, named as in the model where the groups have no names.

    Raises:
        TypeError: what is no group.
        ValueError: a misspelt AGC option, a parameter of another model, or no parameter at all.
    """
    known = {id(entry.param): entry for entry in entries}
    read: list[Given] = []
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(
                f"groups takes dicts with 'params', as torch.optim does, not {group!r:.60}"
            )
        check_spelling(group, f" in groups[{index}]")
        members: list[tuple[str, Entry]] = []
        for i, (name, param) in enumerate(_named(group)):
            entry = known.get(id(param))
            if entry is None:
                raise ValueError(
                    f"groups[{index}] has a parameter {i}{f' ({name!r})' if name else ''}, shape"
                    f" {tuple(param.shape)}, that is none of {type(model).__name__}'s; make groups"
                    " of the same model, after whatever replaces its parameters"
                )
            members.append((name or entry.names[0], entry))
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        read.append((options, members))
    if not any(members for _, members in read):
        raise ValueError("groups has no parameters")
    return read


def _named(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """A group as tuples of name and parameter, whichever of torch.optim's forms it has."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("param_names") or [None] * len(params)
    pairs = zip(names, params, strict=True)
    return [param if isinstance(param, tuple) else (name, param) for name, param in pairs]
