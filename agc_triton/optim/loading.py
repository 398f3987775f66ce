"""What torch.optim's load_state_dict does not load as it was saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def load_scalars(optimizer: Optimizer, saved: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Scalars in fp32 again: torch has rounded all but step counts to their parameters' dtypes.

    ``saved`` is the state_dict that has been loaded.
    """
    names = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for name, param in zip(names, params, strict=True):
        given = saved["state"].get(name, {})
        for key in keys:
            if key != "step" and isinstance(given.get(key), Tensor):
                device = optimizer.state[param][key].device
                value = given[key].detach().to(device, torch.float32, copy=True)
                optimizer.state[param][key] = value
