"""The torch path's two lanes: the same numbers, nothing lost, the process as it was."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent import futures
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from agc_triton import adaptive_clip_grad_, blocks, lanes, reference
from agc_triton.lanes import lanes_for, share
from agc_triton.norms import clip_factors
from tests.cases import NAMES, STATEFUL, build, make_grads, randn, step_with
from tests.helpers import same

# Several blocks of rows each, tensors that share one, and a unit that is cut.
SHAPES = ((40, 10), (30, 4, 3), (4,), (2, 3), (), (97,))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, two_lanes: None) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 40)
    monkeypatch.setattr(blocks, "SMALL", 8)


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(shape, dtype, seed=i) for i, shape in enumerate(SHAPES)]


def stepped(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """Parameters and states after three steps."""
    params = tensors(dtype)
    optimizer = build(name, params, {**STATEFUL[name], "clipping": 0.05, **options})
    for step in range(3):
        step_with(optimizer, params, make_grads(params, step))
    return [*params, *(dict(state) for state in optimizer.state.values())]


def meet(work: Callable[..., None]) -> Callable[..., None]:
    """``work``, at the start of which each lane once waits for the other."""
    barrier, met = Barrier(lanes.LANES, timeout=60), threading.local()

    def waiting(*args: Any) -> None:
        if not hasattr(met, "already"):
            met.already = True
            barrier.wait()
        work(*args)

    return waiting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_one_thread(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    with monkeypatch.context() as patch:
        # Each lane has clipped gradients in its memory while the other writes its own.
        patch.setattr(reference, "_step_part", meet(reference._step_part))
        shared = stepped(name, dtype)
    torch.set_num_threads(1)
    assert same(shared, stepped(name, dtype))


def test_the_functional_form_is_shared_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip() -> list[Any]:
        params = tensors()
        for param, grad in zip(params, make_grads(params, 0), strict=True):
            param.grad = grad
        adaptive_clip_grad_(params, 0.05)
        return [param.grad for param in params]

    seen = set()

    def noted(*args: Any) -> Any:
        seen.add(threading.get_ident())
        return clip_factors(*args)

    monkeypatch.setattr("agc_triton.blocks.clip_factors", noted)
    shared = clip()
    assert seen
    assert threading.get_ident() not in seen
    torch.set_num_threads(1)
    assert same(shared, clip())
    assert threading.get_ident() in seen


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (torch.no_grad, 2),
        (torch.enable_grad, 1),
        (torch.inference_mode, 1),
        (torch.profiler.profile, 1),
        (FunctionMode, 1),
        (DispatchMode, 1),
    ],
)
@torch.no_grad()
def test_what_is_bound_to_a_thread_stays_in_it(
    context: Callable[[], AbstractContextManager[Any]], expected: int
) -> None:
    with context():
        assert lanes_for(1 << 30) == expected


@torch.no_grad()
def test_not_for_few_elements_or_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "SHARED", 100)
    assert [lanes_for(n) for n in (99, 100)] == [1, 2]
    torch.set_num_threads(1)
    assert lanes_for(100) == 1


def test_a_step_in_inference_mode_and_under_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        inside = stepped("AdamW")
    assert same(inside, stepped("AdamW"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stepped("AdamW")
    assert "aten::linalg_vector_norm" in {event.key for event in profile.key_averages()}


def test_torchs_threads_are_shared_out_and_given_back() -> None:
    numbers: dict[str, set[int]] = {"lanes": set(), "later": set()}

    def ask(where: str) -> None:
        numbers[where].add(torch.get_num_threads())

    for total, each in ((2, 1), (5, 2), (4, 2), (2, 1)):
        for seen in numbers.values():
            seen.clear()
        torch.set_num_threads(total)
        share(meet(lambda lane, item: ask("lanes")), range(10), lanes.LANES)
        later = Thread(target=ask, args=("later",))
        later.start()
        later.join()
        assert numbers == {"lanes": {each}, "later": {total}}
        assert torch.get_num_threads() == total


@pytest.mark.parametrize("count", [1, lanes.LANES])
def test_each_item_once(count: int) -> None:
    done: list[tuple[int, int]] = []
    share(lambda lane, item: done.append((lane, item)), range(1000), count)
    assert sorted(item for _, item in done) == list(range(1000))
    assert {lane for lane, _ in done} <= set(range(count))


def test_an_error_ends_both_lanes_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    both, stopped, begun = Barrier(lanes.LANES, timeout=60), Event(), []

    class Stopping(Event):
        def set(self) -> None:
            super().set()
            stopped.set()

    def work(lane: int, item: int) -> None:
        begun.append(item)
        if item < lanes.LANES:
            both.wait()
        if item == 1:
            raise ZeroDivisionError("of item 1")
        if item == 0:  # still at work when the other fails
            assert stopped.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr("agc_triton.lanes.Event", Stopping)
        with pytest.raises(ZeroDivisionError, match="of item 1"):
            share(work, range(1000), lanes.LANES)
    assert sorted(begun) == [0, 1]
    share(work, range(2, 9), lanes.LANES)  # the lanes are there for the next step
    assert sorted(begun) == list(range(9))


def test_an_interrupt_waits_for_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, begun, ended = Event(), [], []

    def work(lane: int, item: int) -> None:
        begun.append(item)
        if item == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert interrupted.wait(60)
        ended.append(item)

    def waiting(running: Any) -> None:
        interrupted.set()
        futures.wait(running)

    monkeypatch.setattr("agc_triton.lanes.wait", waiting)
    with pytest.raises(KeyboardInterrupt):
        share(work, range(1000), lanes.LANES)
    assert 0 in begun
    assert len(begun) <= lanes.LANES
    assert sorted(begun) == sorted(ended)


@pytest.mark.parametrize("name", NAMES)
def test_skipped_units_are_all_counted(name: str) -> None:
    params = [randn((200, 4), seed=0), randn((200, 4), seed=1)]
    optimizer: Any = build(name, params, {**STATEFUL[name], "nonfinite": "skip_unit"})
    for step in range(3):
        grads = make_grads(params, step)
        for grad in grads:
            grad[::2, 1] = torch.nan
        step_with(optimizer, params, grads)
    assert optimizer.skipped_units == 3 * 200


def test_optimizers_in_several_threads() -> None:
    results: dict[str, list[Any]] = {}
    names = ("AdamW", "SGD", "RMSprop", "Adam")
    running = [Thread(target=lambda n=name: results.update({n: stepped(n)})) for name in names]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert same(results, {name: stepped(name) for name in names})


def test_a_forked_process_has_lanes_of_its_own(tmp_path: Path) -> None:
    expected = stepped("AdamW")
    child = os.fork()
    if child == 0:
        try:
            torch.save(stepped("AdamW"), tmp_path / "child.pt")
        finally:
            os._exit(0)  # without pytest's own ending
    os.waitpid(child, 0)
    assert same(torch.load(tmp_path / "child.pt"), expected)


def test_a_default_device_is_no_matter() -> None:
    expected = stepped("AdamW")
    params = tensors()
    optimizer = build("AdamW", params, {**STATEFUL["AdamW"], "clipping": 0.05})
    grads = [make_grads(params, step) for step in range(3)]
    with torch.device("meta"):
        for those in grads:
            step_with(optimizer, params, those)
    assert same([*params, *(dict(state) for state in optimizer.state.values())], expected)
