"""Two ranks on gloo: DistributedDataParallel and ZeroRedundancyOptimizer, as one process would."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.optimizers import EACH_WAY, NAMES, PAIRS, STATEFUL, build
from tests.support.places import DEVICE
from tests.support.ranks import RANKS, once_on_ranks
from tests.support.tensors import same

STEPS = 3
AGC: dict[str, Any] = {"clipping": 0.02}
# The ranks' parameters are on the CPU, which the kernels take in the interpreter only.
BACKENDS = ["torch", "triton"] if DEVICE == "cpu" else ["torch"]
CASES = [*itertools.product(NAMES, ["torch"]), *itertools.product(EACH_WAY, BACKENDS[1:])]


def data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, torch.randn(8, 4, dtype=torch.float64)


def train(model: nn.Module, batch: Tensor, optimizers: Sequence[Any]) -> None:
    for _ in range(STEPS):
        model.zero_grad()
        torch.autograd.backward((model(batch) ** 2).mean())
        for optimizer in optimizers:
            optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def train_both(rank: int) -> dict[str, Any]:
    """Both wrappers, one after the other, on this rank's half of the batch."""
    # Compiles TorchScript on import, with a warning that pytest would raise.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    results = {}
    for name, backend in CASES:
        options: dict[str, Any] = {**STATEFUL[name], **AGC, "backend": backend}
        start, batch = data()
        half = batch.chunk(RANKS)[rank]
        plain, sharded = (DistributedDataParallel(copy.deepcopy(start)) for _ in range(2))
        train(plain, half, [build(name, plain.parameters(), options)])
        cls = PAIRS[getattr(torch.optim, name)]
        zero: Any = ZeroRedundancyOptimizer(sharded.parameters(), optimizer_class=cls, **options)
        train(sharded, half, [zero])
        results[f"{name}, {backend}"] = (values(plain), values(sharded))
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ends with."""
    return once_on_ranks(train_both, __name__, tmp_path_factory)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_two_ranks_train_as_one_process_on_the_whole_batch(
    ranks: list[Any], name: str, backend: str
) -> None:
    model, batch = data()
    before = copy.deepcopy(values(model))
    options: dict[str, Any] = {**STATEFUL[name], **AGC, "backend": backend}
    train(model, batch, [build(name, model.parameters(), options)])
    first, second = (each[f"{name}, {backend}"][0] for each in ranks)
    assert same(first, second)
    assert not any(map(same, before, first))
    # Sums over the batch are made in another order.
    torch.testing.assert_close(first, values(model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_sharded_states_change_no_bit(ranks: list[Any], name: str, backend: str) -> None:
    for each in ranks:
        plain, sharded = each[f"{name}, {backend}"]
        assert same(plain, sharded)
