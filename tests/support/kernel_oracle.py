"""The oracle of the kernels, which compute in fp32 (fp64) whatever they store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.formulas import SCALARS
from tests.support.oracle import Oracle
from tests.support.rounded import Rounded
from tests.support.tolerances import TOLERANCES, Tolerance


def kernel_tolerance(dtype: torch.dtype, interpreted: bool) -> Tolerance:
    """The entry of the tolerance table for the kernels."""
    key = f"{str(dtype.to_real()).removeprefix('torch.')}, Triton"
    if interpreted and f"{key} interpreted" in TOLERANCES:
        key += " interpreted"
    return TOLERANCES[key]


class KernelOracle(Oracle):
    """Holds whatever is not stored in fp32 (fp64): also the clipped gradient of 16-bit parameters.

    With 16 bits, `load` the implementation's values before each step.
    """

    def __init__(
        self, name: str, params: Sequence[Tensor], interpreted: bool, **options: Any
    ) -> None:
        self.entry = kernel_tolerance(params[0].dtype, interpreted)
        narrow = self.entry.stored is not self.entry.rule
        self.compute = kernel_tolerance(self.entry.rule, interpreted) if narrow else self.entry
        known = {k: v for k, v in options.items() if k not in ("backend", "capturable")}
        super().__init__(name, params, self.compute, **known)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """As the kernels do it."""
        self.tolerance = self.compute
        super().step(grads)
        if self.entry is not self.compute:
            self.params = [self._stored(p) for p in self.params]
            self.states = [
                {key: x if key in SCALARS else self._stored(x) for key, x in state.items()}
                for state in self.states
            ]
            self.tolerance = self.entry

    def _stored(self, x: Rounded) -> Rounded:
        return Rounded(x.value, self.compute.margin * x.error, x.dtype).to(self.entry.stored)
