"""Many steps and forks: nothing is left behind and no number changes."""

from __future__ import annotations

import gc
import os
import traceback
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agc_triton.triton_path.launch_group import LaunchGroup
from agc_triton.triton_path.launches import Launch
from agc_triton.triton_path.plan import TritonPlan
from tests.support.optimizers import STATEFUL, build
from tests.support.places import DEVICE, few_weights
from tests.support.soak import soaked
from tests.support.tensors import same
from tests.support.training import train

# With and without step counts.
every_name = pytest.mark.parametrize("name", ["SGD", "AdamW"])
both_paths = pytest.mark.parametrize("backend", ["torch", "triton"])
by_turns = pytest.mark.parametrize(
    ("name", "backend"),
    soaked(
        [("SGD", "torch"), ("SGD", "triton"), ("AdamW", "torch"), ("AdamW", "triton")],
        lambda name, backend: (name == "SGD") is (backend == "torch"),
    ),
)


def make(name: str, params: Any, backend: str) -> Any:
    return build(name, params, {**STATEFUL[name], "clipping": 0.05, "backend": backend})


def steps_with_holes(optimizer: Any, params: list[Tensor], steps: int) -> None:
    """Gradients come and go in all eight patterns, in new memory; units change, so do plans."""
    for step in range(steps):
        optimizer.param_groups[0]["unit_dim"] = step // 4 % 2
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if step >> i & 1 else None
        optimizer.step()


def census() -> tuple[int, dict[str, int]]:
    """How many objects there are, and how many of them are tensors and plans."""
    gc.collect()
    objects = gc.get_objects()
    kinds = {"tensors": Tensor, "plans": TritonPlan, "launch groups": LaunchGroup}
    counts = {key: sum(issubclass(type(x), kind) for x in objects) for key, kind in kinds.items()}
    return len(objects), counts


@by_turns
def test_steps_leave_no_objects_behind(name: str, backend: str) -> None:
    params = few_weights()
    optimizer = make(name, params, backend)
    steps = {"torch": 200, "triton": 16}[backend]
    steps_with_holes(optimizer, params, steps)
    before = census()
    steps_with_holes(optimizer, params, steps)
    after = census()
    assert after[1] == before[1]
    assert after[0] - before[0] < steps // 2


@pytest.mark.soak
@both_paths
@every_name
def test_five_thousand_steps_leave_no_objects_behind(name: str, backend: str) -> None:
    params = few_weights()
    optimizer = make(name, params, backend)
    steps_with_holes(optimizer, params, 400 if backend == "torch" else 24)
    before = census()
    steps_with_holes(optimizer, params, 5000)
    after = census()
    assert after[1] == before[1]
    assert after[0] - before[0] < 500


@by_turns
def test_steps_leave_no_memory_behind(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton's interpreter is too slow to trace, and allocates on its own: plans only.
    monkeypatch.setattr(Launch, "fire", lambda launch, *varying: None)
    params = few_weights()
    optimizer = make(name, params, backend)
    held = []
    tracemalloc.start()
    try:
        for _ in range(3):
            steps_with_holes(optimizer, params, 200)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # Not one small object per step: torch's and Python's caches settle, a leak goes on.
    assert min(held[1] - held[0], held[2] - held[1]) < 32 * 200


# A forked process cannot use CUDA.
@pytest.mark.parametrize("backend", ["torch", "triton"] if DEVICE == "cpu" else ["torch"])
@every_name
def test_a_forked_process_goes_on_alone(name: str, backend: str, tmp_path: Path) -> None:
    params: list[Any] = [p.cpu() for p in few_weights()]
    optimizer = make(name, params, backend)
    train(optimizer, params, range(2))

    def go_on() -> Any:
        train(optimizer, params, range(2, 4))
        return {"params": params, "optimizer": optimizer.state_dict()}

    child = os.fork()
    if child == 0:
        try:
            torch.save(go_on(), tmp_path / "child.pt")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # without pytest's own ending
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(torch.load(tmp_path / "child.pt", weights_only=True), go_on())
