"""A run that stops and goes on in another process, or runs again, ends with the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import interpret_without_gpu
from tests.support.optimizers import EACH_WAY, NAMES, build, stateful
from tests.support.places import PLACES, Place, label
from tests.support.ranks import apart
from tests.support.soak import soaked
from tests.support.tensors import FEW_SHAPES, same, set_grads

DTYPES = (torch.float32, torch.bfloat16)
STOP, END = 2, 4
CASES = {
    f"{name}, {label(place)}, {dtype}": (name, place, dtype)
    for name, place, dtype in itertools.product(NAMES, PLACES, DTYPES)
    # 16 bits are saved and loaded alike whatever the rule, and so are the kernels' tables.
    if name in EACH_WAY or (place.backend == "torch" and dtype is torch.float32)
}

every_name = pytest.mark.parametrize("name", NAMES)


class Run:
    """Parameters, half of them in a group of its own, and the optimizer that trains them."""

    def __init__(
        self, name: str, place: Place, dtype: torch.dtype, order: Sequence[int] | None = None
    ) -> None:
        self.params: list[Any] = place.weights(FEW_SHAPES, dtype)
        groups: Any = [self.params[i] for i in order or ()]
        if order is None:
            groups = [{"params": self.params[:1], "clipping": 0.2}, {"params": self.params[1:]}]
        self.optimizer: Any = build(
            name,
            groups,
            {**stateful(name, dtype), "clipping": 0.05, "backend": place.backend, "agc_eps": 0.01},
        )

    def train(self, steps: range) -> None:
        """Steps on gradients that depend on the step and the parameter alone."""
        for step in steps:
            set_grads(self.params, step)
            self.optimizer.step()

    def saved(self) -> dict[str, Any]:
        """What a training loop would save."""
        return {"params": self.params, "optimizer": self.optimizer.state_dict()}

    def load(self, saved: dict[str, Any]) -> None:
        for param, value in zip(self.params, saved["params"], strict=True):
            param.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])

    def result(self) -> list[Tensor]:
        """Parameters and states in the order of the parameters, whatever that of the optimizer."""
        return [t for p in self.params for t in (p, *self.optimizer.state[p].values())]


def go_on(file: Path) -> None:
    """What the new process does: one checkpoint per case is read, trained on and written back."""
    torch.set_num_threads(1)
    interpret_without_gpu()
    checkpoints = torch.load(file, weights_only=True)
    for case, saved in checkpoints.items():
        run = Run(*CASES[case])
        run.load(saved)
        run.train(range(STOP, END))
        checkpoints[case] = run.saved()
    torch.save(checkpoints, file)


def in_another_process(file: Path) -> Any:
    """The end of every case, half of whose steps it has made."""
    checkpoints = {}
    for case, given in CASES.items():
        run = Run(*given)
        run.train(range(STOP))
        checkpoints[case] = run.saved()
    torch.save(checkpoints, file)
    assert apart(go_on, file) == 0
    return torch.load(file, weights_only=True)


def test_another_process_goes_on_without_changing_a_bit(tmp_path: Path) -> None:
    resumed = in_another_process(tmp_path / "checkpoints.pt")
    for case, given in CASES.items():
        run = Run(*given)
        start = [p.clone() for p in run.params]
        run.train(range(END))
        assert same(resumed[case], run.saved()), case
        assert not any(map(same, start, run.params)), case


@every_name
def test_three_runs_give_the_same_bits(name: str, place: Place) -> None:
    def run() -> list[Tensor]:
        each = Run(name, place, torch.float32)
        each.train(range(2))
        return each.result()

    first = run()
    assert all(same(run(), first) for _ in range(2))


@pytest.mark.parametrize(
    ("name", "dtype"),
    soaked(
        itertools.product(NAMES, DTYPES),
        lambda name, dtype: name in EACH_WAY and (name == "SGD") is (dtype is torch.bfloat16),
    ),
    ids=str,
)
def test_the_order_of_the_parameters_changes_no_bit(
    name: str, place: Place, dtype: torch.dtype
) -> None:
    def run(order: Sequence[int]) -> list[Tensor]:
        each = Run(name, place, dtype, order)
        each.train(range(2))
        return each.result()

    first, *others = map(run, ((0, 1, 2), (1, 2, 0), (2, 1, 0)))
    assert all(same(other, first) for other in others)
