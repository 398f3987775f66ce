"""Groups of the same options taken together: what a call costs is not paid for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

# What a group has that is not an option.
_OWN = ("params", "param_names")


class Merged(NamedTuple):
    """Parameter groups whose options are equal, as one; ``indices`` are theirs."""

    indices: list[int]
    group: dict[str, Any]


def merged(groups: Iterable[tuple[int, dict[str, Any]]]) -> list[Merged]:
    """Groups by their options, each where its first was; options that do not hash stay alone.

    Tensors among them are the same where they are the same object.
    """
    found: dict[object, Merged] = {}
    for index, group in groups:
        try:
            key: object = tuple([item for item in group.items() if item[0] not in _OWN])
            before = found.get(key)
        except TypeError:
            key, before = index, None
        if before is None:
            found[key] = Merged([index], group)
        elif len(before.indices) == 1:  # the first list is the user's own
            params = [*before.group["params"], *group["params"]]
            both = {**before.group, "params": params}
            found[key] = Merged([*before.indices, index], both)
        else:
            before.indices.append(index)
            before.group["params"].extend(group["params"])
    return list(found.values())
