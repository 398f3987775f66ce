"""Steps on several sets of tensors in turn, so that none finds its data in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.lib.providers import Provider
from benchmarks.lib.timing import Turn
from benchmarks.lib.workloads import Workload

# All sets together exceed the L2 cache this many times.
CACHES = 4
# What fits this often is measured in part from the cache: nobody trains models that small.
MAX_SETS = 2000
# Where torch does not say: more than any GPU has.
UNKNOWN_CACHE = 256 << 20


def cache_bytes(device: torch.device) -> int:
    """The L2 cache of a GPU; 0 on a CPU, whose steps find what writing the gradients leaves."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "L2_cache_size", 0) or UNKNOWN_CACHE


def sets_needed(set_bytes: int, cache: int) -> int:
    """How many sets exceed a cache `CACHES` times; one where a single set does."""
    return min(CACHES * cache // set_bytes + 1, MAX_SETS)


class Rotation:
    """Providers over ``count`` sets of a workload's parameters and gradients.

    The providers share the memory of parameters and gradients; states are each one's own. A set's
    gradients are written anew after each step, when the next step is made ready: with several sets
    they have left the cache by the time they are read.
    """

    def __init__(self, providers: Sequence[Provider], workload: Workload, count: int) -> None:
        self.count = count
        self._fresh = workload.grads
        self._grads = [[g.clone() for g in workload.grads] for _ in range(count)]
        shared = [[p.clone() for p in workload.params] for _ in range(count)]
        # By provider, then by set.
        self.params = [
            [_with_grads(*one) for one in zip(shared, self._grads, strict=True)] for _ in providers
        ]
        self.steps = [
            [provider.build(params) for params in own]
            for provider, own in zip(providers, self.params, strict=True)
        ]
        self._at = -1

    def keep(self, providers: Sequence[int]) -> None:
        """Forget the others, and free what only they held."""
        self.params = [self.params[i] for i in providers]
        self.steps = [self.steps[i] for i in providers]

    def turn(self, provider: int, at: int | None = None) -> Turn:
        """What makes ready for a provider's step on a set, by default the next, and the step."""
        before, self._at = self._at, (self._at + 1) % self.count if at is None else at
        return partial(self.restore, before), self.steps[provider][self._at]

    def restore(self, at: int) -> None:
        """Write a set's gradients anew."""
        torch._foreach_copy_(self._grads[at], self._fresh)


def _with_grads(tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    params: list[Tensor] = [Parameter(tensor) for tensor in tensors]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params
