"""A run trains what it says, and clipping is the only difference between its arms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import Optimizer

from agc_triton import unitwise_norm
from benchmarks.lib import optimizers
from benchmarks.lib.compare import training
from benchmarks.lib.compare.training import COLUMNS, Training, Where, data_of, train
from benchmarks.lib.networks import classifier
from benchmarks.lib.optimizers import for_training
from tests.benchmarks.compare.runs import RUN, lasting
from tests.support.places import DEVICE

ON = torch.device(DEVICE)


def test_rows_say_what_was_trained(where: Where) -> None:
    rows = list(train(RUN, 0, where))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert list(row) == COLUMNS
        assert {name: row[name] for name in RUN._fields} == RUN._asdict()
        assert math.isfinite(row["train_loss"] + row["test_loss"])
        assert 0 <= row["train_accuracy"] <= 1
        assert 0 < row["share_of_units_clipped"] <= 1
        assert row["images_per_s"] == pytest.approx(128 / row["seconds"])
        assert row["diverged"] == (row["test_accuracy"] < 0.2)


@pytest.mark.parametrize(
    ("optimizer", "model"),
    [
        ("sgd", "nf_resnet"),
        ("sgd", "bn_resnet"),
        ("adam", "cnn"),
        ("adamw", "cnn"),
        ("rmsprop", "cnn"),
    ],
)
def test_clipping_is_the_only_difference(
    where: Where, optimizer: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUN._replace(model=model, optimizer=optimizer, lr=0.001, epochs=1)
    (off,), (on,), (at_ease,) = (
        lasting(list(train(run._replace(clipping=clipping), 0, where)))
        for clipping in (0.0, 0.001, 1e9)
    )
    assert off["share_of_units_clipped"] is None
    assert at_ease["share_of_units_clipped"] == 0
    measured = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    exactly = DEVICE == "cpu"  # kernels round otherwise than torch
    for name in measured:
        assert at_ease[name] == (off[name] if exactly else pytest.approx(off[name], rel=0.05))
    assert [on[name] for name in measured] != [off[name] for name in measured]


def test_both_arms_leave_the_same_parameters_undecayed() -> None:
    net = classifier("nf_resnet", 8, 10, 1)
    on, off = (for_training("adamw", net, 0.1, clipping).param_groups for clipping in (0.01, 0.0))
    decayed = [
        {p: group["weight_decay"] for group in groups for p in group["params"]}
        for groups in (on, off)
    ]
    assert decayed[0] == decayed[1]
    clipped = {p: group["clipping"] for group in on for p in group["params"]}
    head = set(net.get_submodule("head").parameters())
    assert clipped == {p: 0 if p in head else 0.01 for p in net.parameters()}


def test_the_share_of_clipped_units_is_that_of_the_last_batch(where: Where) -> None:
    run = RUN._replace(clipping=0.01)
    made = Training(run, data_of(run, where), ON)
    shares: list[float] = []

    def look(optimizer: Optimizer, *_: object) -> None:
        over = [
            unitwise_norm(p.grad, group["unit_dim"])
            > run.clipping * unitwise_norm(p, group["unit_dim"]).clamp(min=group["agc_eps"])
            for group in optimizer.param_groups
            for p in group["params"]
            if group["clipping"]
        ]
        shares.append(torch.cat([o.flatten() for o in over]).double().mean().item())

    made.optimizer.register_step_pre_hook(look)
    found = [made.epoch()["share_of_units_clipped"] for _ in range(2)]
    assert found == pytest.approx([shares[1], shares[3]])
    assert shares[2] != shares[3]


def test_a_run_ends_where_its_loss_is_not_finite(where: Where) -> None:
    rows = list(train(RUN._replace(lr=1e9, clipping=0.0), 0, where))
    assert not math.isfinite(rows[-1]["train_loss"] + rows[-1]["test_loss"])
    assert len(rows) < RUN.epochs
    assert rows[-1]["diverged"] is True


def test_large_batches_go_in_chunks(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RUN._replace(batch=160, epochs=1)
    (whole,) = train(run, 0, where)
    sizes: list[int] = []
    monkeypatch.setattr(training, "CHUNK", 50)
    loss = Training._loss

    def sized(self: Training, images: torch.Tensor, labels: torch.Tensor) -> object:
        sizes.append(len(images))
        return loss(self, images, labels)

    monkeypatch.setattr(Training, "_loss", sized)
    fresh = where._replace(unfinished=where.unfinished / "chunks")
    (in_chunks,) = train(run, 0, fresh)
    assert max(sizes) == 50
    assert sum(sizes) == 160 + 360
    for name in ("train_loss", "test_loss"):
        assert in_chunks[name] == pytest.approx(whole[name], rel=0.02)  # other crops


def test_autocast_trains_in_its_dtype(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RUN._replace(dtype="bfloat16")
    made = Training(run, data_of(run, where), ON)
    outputs: list[torch.dtype] = []
    made.net.register_forward_hook(lambda net, inputs, out: outputs.append(out.dtype))
    assert math.isfinite(made.epoch()["train_loss"])
    assert set(outputs) == {torch.bfloat16}


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_a_run_goes_on_with_the_same_bits(where: Where, optimizer: str) -> None:
    # Batch norm has states of its own.
    model = "bn_resnet" if optimizer == "sgd" else "cnn"
    run = RUN._replace(optimizer=optimizer, lr=0.002, model=model)
    where = where._replace(device="cpu")  # a GPU adds up in any order
    whole = lasting(list(train(run, 0, where)))
    elsewhere = where._replace(unfinished=where.unfinished / "cut")
    first = next(iter(train(run, 0, elsewhere)))
    rest = list(train(run, 1, elsewhere))
    assert lasting([first, *rest]) == whole


def test_what_was_kept_but_not_written_is_given_again(where: Where) -> None:
    whole = list(train(RUN, 0, where))
    assert list(train(RUN, 1, where)) == whole[1:]
    assert list(train(RUN, 0, where)) == whole
    assert list(train(RUN, 3, where)) == []


def test_a_run_that_was_not_kept_repeats_no_row(where: Where) -> None:
    where = where._replace(device="cpu")
    whole = lasting(list(train(RUN, 0, where)))
    elsewhere = where._replace(unfinished=where.unfinished / "lost")
    assert lasting(list(train(RUN, 2, elsewhere))) == whole[2:]
