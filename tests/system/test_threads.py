"""Two threads at once: neither finds anything of the other's.

Triton's interpreter keeps the running program's index in globals: on the Triton path everything is
done but the launches, of which it is recorded what they would read.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import agc_triton.clipping
from agc_triton import adaptive_clip_grad_
from agc_triton.triton_path.launches import Launch
from tests.support.checks import check_clipped
from tests.support.optimizers import CLIPPING, EACH_WAY, NAMES, STATEFUL, build
from tests.support.places import DEVICE, few_weights
from tests.support.plans import bound_args, plan_of
from tests.support.soak import soaked
from tests.support.tensors import grad_like, parameters, same, weight
from tests.support.training import train

THREADS = 2
every_name = pytest.mark.parametrize("name", soaked(NAMES, lambda name: name in EACH_WAY))
both_paths = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns a thousand times as often as they do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """What a function returns, called at the same time with different numbers."""
    start = threading.Barrier(THREADS)

    def together(seed: int) -> Any:
        start.wait()
        return work(seed)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(together, range(THREADS)))


class Recorded:
    """A run on the Triton path whose launches only leave a record."""

    now = threading.local()

    def __init__(self, name: str, seed: int) -> None:
        self.params = few_weights(seed=seed)
        halves = ({"params": self.params[:1], "clipping": 0.2}, {"params": self.params[1:]})
        options = {**STATEFUL[name], "backend": "triton", "nonfinite": "skip_unit"}
        self.optimizer: Any = build(name, halves, options)
        self.seed = seed
        self.launches: list[Any] = []

    def train(self, steps: int) -> list[Any]:
        """Steps that need new plans, new addresses and new values by turns."""
        self.now.run = self
        for step in range(steps):
            self.optimizer.param_groups[0]["unit_dim"] = step // 4 % 2
            self.optimizer.param_groups[1]["lr"] = self.seed + step / 8
            for i, p in enumerate(self.params):
                p.grad = grad_like(p) if step >> i & 1 else None
            self.optimizer.step()
        return self.launches

    def record(self, launch: Launch, *varying: Any) -> None:
        """Which kernel, how many programs, and the contents of its tables."""
        names = {p.data_ptr(): f"p{i}" for i, p in enumerate(self.params)}
        for i, p in enumerate(self.params):
            if p.grad is not None:
                names[p.grad.data_ptr()] = f"g{i}"
            for key, state in self.optimizer.state.get(p, {}).items():
                names[state.data_ptr()] = f"{key}{i}"
        plan = plan_of(self.optimizer)
        own = self.optimizer._paths.triton._own
        for i, p in enumerate(self.params):
            for scalar in own._known.get(p, ()):
                names[scalar.data_ptr()] = f"own{i}"
        (part,) = plan.parts
        tables, launcher = part.launches.tables, part.launches.launcher
        args = bound_args(launch)
        shared = bound_args(launcher.untracked.opening)
        for name in ("tensors_ptr", "prepared_ptr", "sums_ptr"):
            assert args[name] is shared[name]
        if launch is not launcher.untracked.opening:
            (page,) = self.optimizer._paths.recorder.records.pages()
            assert args["skips_ptr"] is page.skips
        assert any(x is tables.addresses for x in varying)
        addresses = [a and names[a] for a in tables.addresses.tolist()]
        contents = args["tiles_ptr"].tolist(), addresses, tables.values.clone()
        self.launches.append((launch.kernel.__name__, launch.grid, contents))


@pytest.mark.usefixtures("switching")
@every_name
def test_the_torch_path_steps_as_if_alone(name: str) -> None:
    def run(seed: int) -> list[Any]:
        params = parameters(seed=seed)
        options = {**STATEFUL[name], "clipping": CLIPPING, "backend": "torch"}
        optimizer = build(name, params, options)
        train(optimizer, params, range(seed, seed + 40))
        return [(p.detach(), *optimizer.state[p].values()) for p in params]

    assert same(in_threads(run), [run(seed) for seed in range(THREADS)])


@pytest.mark.usefixtures("switching")
@every_name
def test_plans_are_made_and_refreshed_as_if_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launch, "fire", lambda *args: Recorded.now.run.record(*args))

    def run(seed: int) -> list[Any]:
        return Recorded(name, seed).train(16)

    together = in_threads(run)
    alone = [run(seed) for seed in range(THREADS)]
    assert same(together, alone)
    assert len(alone[0]) > 16


class Emptied(OrderedDict[Any, Any]):
    """Another thread's clipping pushes everything out whenever a method is looked up."""

    def __getattribute__(self, name: str) -> Any:
        OrderedDict.clear(self)
        return super().__getattribute__(name)


@both_paths
def test_the_other_thread_clips_more_lists_than_plans_are_kept_for(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agc_triton.clipping, "_clippers", Emptied())
    param = weight((3, 4), torch.float32, DEVICE)
    for seed in range(2):
        grad = grad_like(param, seed)
        param.grad = grad.clone()
        adaptive_clip_grad_(param, clipping=CLIPPING, backend=backend)
        check_clipped(param, grad, param.grad)
