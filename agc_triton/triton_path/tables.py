"""The Triton path's tables: what kernels are told of tensors and groups, on the host and there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agc_triton.kernels import abi

# Captures in a row that a plan has pinned memory for: none can be had while a graph is captured.
CAPTURES = 16


class Tables:
    """Addresses and group values: one host array, one device tensor, one copy when they differ.

    Addresses are those of parameters, gradients, scalars and states, a row per role.
    """

    def __init__(self, roles: int, tensors: int, groups: int, device: torch.device) -> None:
        self.roles, self.device = roles, device
        self._sizes = roles, tensors, groups
        addresses = roles * tensors
        values = addresses + groups * (abi.FIXED_VALUES + abi.RULE_VALUES)
        size = values + groups * abi.RULE_VALUES
        self._host = np.zeros(size, np.int64)
        self.host_addresses = self._host[:addresses].reshape(roles, -1)
        self.host_values = self._host[addresses:values].view(np.float64).reshape(groups, -1)
        self.host_pointers = self._host[values:].reshape(groups, -1)
        self.on_device = torch.empty(size, dtype=torch.int64, device=self.device)
        self.addresses = self.on_device[:addresses]
        self.values = self.on_device[addresses:values].view(torch.float64)
        self.pointers = self.on_device[values:]
        # Memory for captured graphs to copy from, which twins share.
        self._for_captures: list[Tensor] = []

    def twin(self) -> Tables:
        """Tables with the same contents, which have not been uploaded."""
        twin = Tables(*self._sizes, self.device)
        twin._host[:] = self._host
        twin._for_captures = self._for_captures
        return twin

    def _staging(self, rows: int) -> Tensor:
        # torch's pool hands a pinned block out again only when the copies from it have finished.
        pinned = self.device.type == "cuda"
        size = rows, len(self._host)
        return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)

    def set_group(self, index: int, values: list[float], pointers: list[int]) -> None:
        """Write a group's row."""
        self.host_values[index, : len(values)] = values
        self.host_pointers[index, : len(pointers)] = pointers

    def upload(self, capturing: bool) -> None:
        """Copy the host's values to the device without waiting for it."""
        if capturing:
            if not self._for_captures:
                self._write_by_value()
                return
            # Replays copy from it again.
            staging = self._replayed = self._for_captures.pop()
        else:
            self._for_captures = self._for_captures or list(self._staging(CAPTURES))
            staging = self._staging(1)[0]
        staging.numpy()[:] = self._host
        self.on_device.copy_(staging, non_blocking=True)

    def _write_by_value(self) -> None:
        """Write every value as an argument of a launch, some hundred each, without host memory."""
        self.on_device.zero_()
        torch._foreach_add_(list(self.on_device.unbind()), self._host.tolist())
