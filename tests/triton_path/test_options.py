"""Options and hyperparameters that change between steps reach the tables, or another plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.optimizers import ADAMW, MOMENTUM, STATEFUL
from tests.support.places import DEVICE, few_weights
from tests.support.training import Training

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


VALUES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"lr": 0.125}),
    ("AdamW", {"betas": (0.5, 0.75)}),
    ("AdamW", {"eps": 0.1}),
    ("AdamW", {"weight_decay": 0.5}),
    ("AdamW", {"maximize": True}),
    ("AdamW", {"clipping": 0.5}),
    ("AdamW", {"clipping": 0}),
    ("AdamW", {"clipping": None}),
    ("AdamW", {"agc_eps": 100.0}),
    ("AdamW", {"unit_dim": 1}),
    ("AdamW", {"capturable": True}),
    ("SGD", {"momentum": 0.0}),
    ("SGD", {"momentum": 0.5}),
    ("SGD", {"dampening": 0.0, "nesterov": True}),
    ("RMSprop", {"alpha": 0.5}),
    ("RMSprop", {"momentum": 0.5}),
]


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize(
    ("backend", "name", "change"),
    [
        *(("triton", *case) for case in VALUES),
        # torch.optim itself refuses capturable on a CPU.
        *(("torch", *case) for case in VALUES if "capturable" not in case[1]),
    ],
    ids=str,
)
def test_options_change(backend: str, name: str, change: dict[str, Any]) -> None:
    options = {"SGD": MOMENTUM, "RMSprop": STATEFUL["RMSprop"]}.get(name, ADAMW)
    training = Training(name, few_weights(), **options, backend=backend)
    training.train()
    training.groups[0].update(change)
    training.train()


def test_momentum_is_switched_on() -> None:
    training = Training("SGD", few_weights(), lr=0.5, dampening=0.4)
    training.train(2)
    training.groups[0]["momentum"] = 0.9
    training.train(2)


CHANGED_IN_PLACE: list[tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]] = [
    ({"lr": torch.tensor(0.5)}, lambda group: group["lr"].fill_(0.125)),
    ({"lr": torch.tensor([0.5])}, lambda group: group["lr"].mul_(0.25)),
    (
        {"lr": torch.tensor(0.5), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
        lambda group: group["betas"][0].fill_(0.5),
    ),
    (
        {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
        lambda group: group["betas"][1].fill_(0.75),
    ),
]


@BACKENDS
@pytest.mark.parametrize(
    ("options", "change"), CHANGED_IN_PLACE, ids=["lr", "lr of shape (1,)", "betas", "betas alone"]
)
def test_options_change_in_place(
    backend: str, options: dict[str, Any], change: Callable[[dict[str, Any]], Any]
) -> None:
    given = {**ADAMW, **copy.deepcopy(options)}
    if backend == "torch":  # torch's foreach, its default on a GPU, refuses tensors for betas
        given["foreach"] = False
    training = Training("AdamW", few_weights(), **given, backend=backend)
    training.train()
    change(training.groups[0])
    training.train()


@BACKENDS
def test_a_list_changes_in_place(backend: str) -> None:
    training = Training("AdamW", few_weights(), **ADAMW, backend=backend)
    training.groups[0]["betas"] = [0.9, 0.99]
    training.train()
    training.groups[0]["betas"][0] = 0.5
    training.train()


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_a_learning_rate_on_the_device_moves() -> None:
    lr = torch.tensor(0.5, device=DEVICE)
    training = Training("AdamW", few_weights(), **{**ADAMW, "lr": lr, "capturable": True})
    training.train()
    left = lr.detach()
    lr.data = torch.tensor(0.125, device=DEVICE)
    left.fill_(torch.nan)
    training.train()


class OnAnotherGPU(Tensor):
    """A tensor that says so."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda:7"))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's own test has two of them")
def test_a_learning_rate_on_another_gpu_is_read_at_every_step() -> None:
    training = Training("AdamW", few_weights(), **ADAMW)
    lr = torch.tensor(0.5)
    training.groups[0]["lr"] = lr.as_subclass(OnAnotherGPU)
    training.train()
    lr.fill_(0.125)
    training.train()
