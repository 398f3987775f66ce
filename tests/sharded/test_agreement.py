"""What ranks have to agree about: overflows, missing and misplaced gradients; explain()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton import AGC, SGD_AGC, AdamW_AGC, adaptive_clip_grad_
from tests.sharded.test_placements import BACKENDS
from tests.support.ranks import RANKS, once_on_ranks
from tests.support.tensors import grad_like, same, weight

OPTIONS: dict[str, Any] = {"lr": 0.5, "clipping": 0.05}
SHAPES = [(4, 6), (2, 6), (5,)]


def distributed(mesh: Any, tensors: list[Tensor]) -> list[Any]:
    """Along the units, across them, and one unit that both ranks share."""
    from torch.distributed.tensor import Shard

    from benchmarks.lib.sharding import placed

    return [placed(t, mesh, [Shard(dim)]) for t, dim in zip(tensors, (0, 1, 0), strict=True)]


def weights() -> list[Tensor]:
    return [weight(shape, device="cpu", seed=i) for i, shape in enumerate(SHAPES)]


def grads() -> list[Tensor]:
    return [grad_like(w, 10 + i) for i, w in enumerate(weights())]


def overflow(mesh: Any, rank: int, backend: str) -> list[Any]:
    """A scaled step, one with an infinity on the last rank, and another; what comes of it."""
    params = distributed(mesh, weights())
    optimizer = AdamW_AGC(params, **OPTIONS, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    seen = []
    for step in range(3):
        for p, g in zip(params, distributed(mesh, grads()), strict=True):
            p.grad = scaler.scale(g)
        if step == 1 and rank == RANKS - 1:
            params[1].grad._local_tensor[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        seen.append([p.full_tensor() for p in params])
    return [*seen, scaler.get_scale(), float(optimizer.state[params[0]]["step"])]


def overflow_elsewhere(mesh: Any, rank: int) -> list[Tensor]:
    """found_inf on one rank only, as torch leaves it where the first gradient is replicated."""
    params = distributed(mesh, weights())
    optimizer: Any = SGD_AGC(params, **OPTIONS)
    optimizer.grad_scale = torch.ones((), device="cpu")
    optimizer.found_inf = torch.full((), float(rank == 0), device="cpu")
    for p, g in zip(params, distributed(mesh, grads()), strict=True):
        p.grad = g
    optimizer.step()
    return [p.full_tensor() for p in params]


def missing(mesh: Any, rank: int, cls: Any, backend: str) -> list[Tensor]:
    """The shared unit and the columns have a gradient on the first rank only."""
    params = distributed(mesh, weights())
    optimizer = cls(params, **OPTIONS, weight_decay=0, backend=backend)
    for _ in range(2):
        for i, (p, g) in enumerate(zip(params, distributed(mesh, grads()), strict=True)):
            p.grad = None if i and rank else g
        optimizer.step()
    return [p.full_tensor() for p in params]


def misplaced(mesh: Any) -> list[str]:
    """Plain gradients of DTensors."""
    from torch.distributed.tensor import DTensor, Replicate

    errors = []
    param: Any = torch.nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Replicate()]))
    for step in (
        SGD_AGC([param], lr=0.1).step,
        AGC(torch.optim.SGD([param], lr=0.1)).step,
        lambda: adaptive_clip_grad_([param]),
    ):
        param.grad = torch.ones(2, 3)
        try:
            step()  # type: ignore[no-untyped-call]  # torch hooks it
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def partial_sums(mesh: Any, rank: int, backend: str) -> Tensor:
    """Each rank has a part of the gradient's sum, as in SequenceParallel."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    param: Any = torch.nn.Parameter(DTensor.from_local(weights()[0], mesh, [Replicate()]))
    optimizer = SGD_AGC([param], **OPTIONS, backend=backend)
    for _ in range(2):
        part = grads()[0] * (rank + 1) / 3
        param.grad = DTensor.from_local(part, mesh, [Partial()])
        optimizer.step()
    whole: Tensor = param.full_tensor().detach()
    return whole


def explained(mesh: Any, backend: str) -> list[list[Any]]:
    params = distributed(mesh, weights())
    table = AdamW_AGC(params, **OPTIONS, backend=backend).explain()
    return table[["backend", "why", "class", "units", "bytes"]].to_numpy().tolist()


def on_this_rank(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {"misplaced": misplaced(mesh)}
    found["elsewhere"] = overflow_elsewhere(mesh, rank)
    for backend in BACKENDS:
        found[f"overflow {backend}"] = overflow(mesh, rank, backend)
        for cls in (SGD_AGC, AdamW_AGC):
            found[f"missing {cls.__name__} {backend}"] = missing(mesh, rank, cls, backend)
        found[f"partial {backend}"] = partial_sums(mesh, rank, backend)
        found[f"explained {backend}"] = explained(mesh, backend)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank ends with."""
    return once_on_ranks(on_this_rank, __name__, tmp_path_factory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: list[Any], backend: str) -> None:
    for each in ranks:
        first, second, third, scale, steps = each[f"overflow {backend}"]
        assert same(first, second)
        assert not same(second, third)
        assert (scale, steps) == (2.0, 2.0)
    assert same(ranks[0][f"overflow {backend}"][2], ranks[1][f"overflow {backend}"][2])


def test_what_one_rank_found_goes_for_all(ranks: list[Any]) -> None:
    for each in ranks:
        assert same(each["elsewhere"], weights())


@pytest.mark.parametrize("cls", [SGD_AGC, AdamW_AGC])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_on_some_ranks_only_counts_as_zero_elsewhere(
    ranks: list[Any], backend: str, cls: Any
) -> None:
    params = weights()
    optimizer = cls(params, **OPTIONS, weight_decay=0)
    for _ in range(2):
        for i, (p, g) in enumerate(zip(params, grads(), strict=True)):
            p.grad = g
            if i == 1:
                p.grad[:, 3:] = 0
            if i == 2:
                p.grad[3:] = 0
        optimizer.step()
    # Without decay what has a gradient of zeros from the start stays, and what has none stays.
    parts = [(..., slice(6)), (..., slice(3)), (..., slice(3))]
    for each in ranks:
        found = each[f"missing {cls.__name__} {backend}"]
        for value, expected, before, part in zip(found, params, weights(), parts, strict=True):
            torch.testing.assert_close(value[part], expected[part], rtol=2e-6, atol=2e-6)
            rest = part[-1].stop
            assert torch.equal(value[..., rest:], before[..., rest:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_ranks_that_are_missing_are_made(ranks: list[Any], backend: str) -> None:
    (param, *_), (grad, *_) = weights(), grads()
    optimizer = SGD_AGC([param], **OPTIONS)
    for _ in range(2):
        param.grad = grad.clone()
        optimizer.step()
    for each in ranks:
        torch.testing.assert_close(each[f"partial {backend}"], param, rtol=2e-6, atol=2e-6)


def test_a_gradient_that_lies_elsewhere_is_refused_by_name(ranks: list[Any]) -> None:
    for each in ranks:
        assert len(each["misplaced"]) == 3
        for error in each["misplaced"]:
            assert "parameter 0 of group 0" in error
            assert "a plain tensor" in error
            assert "distribute_tensor" in error


@pytest.mark.parametrize("backend", BACKENDS)
def test_explain_has_a_row_per_collective(ranks: list[Any], backend: str) -> None:
    for each in ranks:
        (row,) = [row for row in each[f"explained {backend}"] if row[2] == "all-reduce"]
        # Two rows of (2, 6) and one gain: a pair of fp32 each.
        assert row == ["torch.distributed", "adds up over 2 ranks", "all-reduce", 3, 24]
