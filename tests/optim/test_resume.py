"""A run that stops and goes on in another process, or runs again, ends with the same bits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import interpret_without_gpu
from tests.support.optimizers import EACH_RULE, NAMES, build, stateful
from tests.support.places import PLACES, Place, label
from tests.support.tensors import FEW_SHAPES, same, set_grads

DTYPES = (torch.float32, torch.bfloat16)
STOP, END = 2, 4
CASES = {
    f"{name}, {label(place)}, {dtype}": (name, place, dtype)
    for name, place, dtype in itertools.product(EACH_RULE, PLACES, DTYPES)
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


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The end of every case, half of whose steps another process has made."""
    file = tmp_path_factory.mktemp("resume") / "checkpoints.pt"
    checkpoints = {}
    for case, given in CASES.items():
        run = Run(*given)
        run.train(range(STOP))
        checkpoints[case] = run.saved()
    torch.save(checkpoints, file)
    subprocess.run([sys.executable, "-m", "tests.optim.test_resume", str(file)], check=True)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_another_process_goes_on_without_changing_a_bit(resumed: Any, case: str) -> None:
    run = Run(*CASES[case])
    start = [p.clone() for p in run.params]
    run.train(range(END))
    assert same(resumed[case], run.saved())
    assert not any(map(same, start, run.params))


@every_name
def test_five_runs_give_the_same_bits(name: str, place: Place) -> None:
    def run() -> list[Tensor]:
        each = Run(name, place, torch.float32)
        each.train(range(2))
        return each.result()

    first = run()
    assert all(same(run(), first) for _ in range(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_name
def test_the_order_of_the_parameters_changes_no_bit(
    name: str, place: Place, dtype: torch.dtype
) -> None:
    def run(order: Sequence[int]) -> list[Tensor]:
        each = Run(name, place, dtype, order)
        each.train(range(2))
        return each.result()

    first, *others = map(run, itertools.permutations(range(3)))
    assert all(same(other, first) for other in others)


if __name__ == "__main__":
    go_on(Path(sys.argv[1]))
