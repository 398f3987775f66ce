"""Steps on a GPU rotate over sets larger than its cache; the planning and the turns, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.lib import rotation
from benchmarks.lib.measure import Rounds, measure, set_bytes
from benchmarks.lib.providers import Provider, providers
from benchmarks.lib.rotation import CACHES, MAX_SETS, Rotation, cache_bytes, sets_needed
from benchmarks.lib.workloads import Workload, workload_of
from tests.benchmarks.tiny import SHAPES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
L2 = 50 << 20


@pytest.mark.parametrize("megabytes", [1, 7, 50, 100, 199])
def test_sets_exceed_the_cache_several_times(megabytes: int) -> None:
    size = megabytes << 20
    sets = sets_needed(size, L2)
    assert sets > 1
    assert (sets - 1) * size <= CACHES * L2 < sets * size


def test_one_set_is_enough_where_it_exceeds_the_cache_alone() -> None:
    assert sets_needed(CACHES * L2 + 1, L2) == 1
    assert sets_needed(1 << 40, L2) == 1
    assert sets_needed(4, 0) == 1


def test_a_workload_of_next_to_nothing_has_no_end_of_sets() -> None:
    assert sets_needed(4, L2) == MAX_SETS


def test_a_cpu_has_one_set_and_a_gpu_says_how_large_its_cache_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cache_bytes(CPU) == 0
    properties = SimpleNamespace(L2_cache_size=L2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert cache_bytes(CUDA) == L2
    del properties.L2_cache_size
    assert cache_bytes(CUDA) == rotation.UNKNOWN_CACHE


def test_a_set_is_parameters_gradients_and_states() -> None:
    assert {name: set_bytes(name, 100) for name in ("sgd", "adamw")} == {"sgd": 300, "adamw": 400}


class Recorder:
    """A provider that keeps what each step found, and spoils the gradients as clipping does."""

    def __init__(self, name: str) -> None:
        self.found: list[tuple[int, list[Tensor]]] = []
        self.provider = Provider(name, "", "peer", True, self.build)

    def build(self, params: list[Tensor]) -> Callable[[], None]:
        def step() -> None:
            grads = [p.grad for p in params if p.grad is not None]
            self.found.append((params[0].data_ptr(), [g.clone() for g in grads]))
            torch._foreach_zero_(grads)

        return step

    @property
    def sets(self) -> list[int]:
        """The set of each step, as the address of its first parameter."""
        return [address for address, _ in self.found]


@pytest.fixture
def workload() -> Workload:
    return workload_of("tiny", SHAPES)


def assert_grads_are_fresh(recorder: Recorder, workload: Workload) -> None:
    for _, grads in recorder.found:
        for found, fresh in zip(grads, workload.grads, strict=True):
            assert torch.equal(found, fresh)


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_turns_go_round_with_fresh_gradients(sets: int, workload: Workload) -> None:
    recorders = [Recorder("a"), Recorder("b")]
    rotating = Rotation([r.provider for r in recorders], workload, sets)
    order = []
    for provider in (0, 1, 1, 0, 0, 1, 0):
        prepare, step = rotating.turn(provider)
        prepare()
        step()
        order.append(recorders[provider].sets[-1])
    assert len(set(order)) == sets
    assert order == [order[i % sets] for i in range(len(order))]
    for recorder in recorders:
        assert_grads_are_fresh(recorder, workload)


def test_what_is_written_anew_is_not_what_is_stepped_next(workload: Workload) -> None:
    rotating = Rotation([Recorder("a").provider], workload, 2)
    for turn in range(4):
        grads = [p.grad for p in rotating.params[0][turn % 2] if p.grad is not None]
        torch._foreach_mul_(grads, torch.nan)
        prepare, step = rotating.turn(0)
        prepare()
        assert all(g.isnan().all() for g in grads)
        step()


def test_providers_share_tensors_and_keep_their_own_states(workload: Workload) -> None:
    compared = [p for p in providers("adamw") if p.role == "unclipped"] * 2
    rotating = Rotation(compared, workload, 2)
    first, second = rotating.params
    for one, other in zip(first, second, strict=True):
        assert [p.data_ptr() for p in one] == [p.data_ptr() for p in other]
        assert [p.grad for p in one] == [p.grad for p in other]
    addresses = {p.data_ptr() for params in first for p in params}
    assert len(addresses) == 2 * len(SHAPES)
    optimizers = [step.__self__ for steps in rotating.steps for step in steps]  # type: ignore[attr-defined]
    assert len(set(map(id, optimizers))) == 4


def test_every_set_is_warm_before_a_step_is_timed(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = [Recorder("a"), Recorder("b")]
    monkeypatch.setattr("benchmarks.lib.measure.cache_bytes", lambda _: L2)
    monkeypatch.setattr("benchmarks.lib.measure.sets_needed", lambda size, cache: 3)
    rows = measure("sgd", [r.provider for r in recorders], workload, Rounds(2, 4))
    assert set(rows["sets"]) == {3}
    for recorder in recorders:
        *warm_up, _ = recorder.found[1:8]
        assert {address for address, _ in warm_up} == set(recorder.sets)
        # Memory is looked at in the first step and in another.
        assert len(recorder.found) == 1 + 2 * 3 + 4 + 1
        assert_grads_are_fresh(recorder, workload)
