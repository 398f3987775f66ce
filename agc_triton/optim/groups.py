"""What is done to a parameter group before torch.optim's own add_param_group sees it.

What is no group is left to torch, which refuses it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from agc_triton.options import check_level, check_spelling


def check_keys(group: Any, index: int, own: Mapping[str, Any], known: Container[str]) -> None:
    """Check that no option of a group is unknown to the optimizer and nearly one of AGC's.

    Raises:
        ValueError: one is, or is one of the whole optimizer's ``own``.
    """
    if isinstance(group, dict):
        check_level(group, f" in parameter group {index}", own, known)
        check_spelling(group, f" in parameter group {index}", known)


def name_unnamed(group: Any, groups: Sequence[dict[str, Any]]) -> None:
    """Name a group's bare parameters where the others have names: torch refuses to mix the two."""
    if not isinstance(group, dict) or "param_names" in group:
        return
    params = group.get("params")
    if params is None or isinstance(params, set) or not any("param_names" in g for g in groups):
        return
    group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
    if not any(isinstance(param, tuple) for param in params):
        group["param_names"] = [f"unnamed.{len(groups)}.{i}" for i in range(len(params))]
