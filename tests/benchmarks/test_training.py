"""Training reports train what they name; images per second are their output, not tested here."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import training
from benchmarks.lib import networks, plots
from benchmarks.lib.networks import DEFAULT, OWN, default_network, is_known, network
from benchmarks.lib.peers import REWRITTEN, adaptive_clip_grad

NAMES = ["SGD_AGC", "timm AGC, SGD fused", "SGD fused, unclipped"]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return training.random_batch(network(OWN), 4, torch.device("cpu"))


def run(out: Path, *arguments: str) -> pd.DataFrame:
    threads = torch.get_num_threads()
    fixed = ["--device", "cpu", "--steps", "1", "--turns", "2", "--out", str(out)]
    try:
        training.main([*fixed, *arguments])
    finally:
        torch.set_num_threads(threads)
    return pd.read_csv(out)


def test_a_row_per_turn_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "rows.csv"
    table = run(out, "--batches", "2", "3")
    assert list(table.columns) == training.COLUMNS
    rows = table[["batch", "implementation", "turn"]].itertuples(index=False, name=None)
    assert list(rows) == [
        (size, name, turn) for size in (2, 3) for name in NAMES for turn in (1, 2)
    ]
    assert set(table["model"]) == {OWN}
    assert set(table["pixels"]) == {8}
    assert set(table["backend"]) == {"torch"}
    assert (table[["images_per_s", "loss"]] > 0).all(axis=None)
    assert set(table["parameters"]) == {sum(p.numel() for p in network(OWN).model.parameters())}
    picture = out.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(text in printed for text in (str(out), str(picture), *NAMES))


def stepped(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], clip: bool) -> nn.Module:
    """After two steps of torch's SGD, with timm's algorithm on all but the head before."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), **training.OPTIONS)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        if clip:
            adaptive_clip_grad(list(model.parameters())[:-2], training.CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_each_makes_the_steps_it_names(
    batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training.OPTIONS, "lr", 0.5)
    monkeypatch.setitem(sys.modules, "timm.utils", None)
    model = network(OWN).model
    ours, theirs, plain = training.trainers(model)
    for trainer in (ours, theirs, plain):
        losses = [trainer.step(*batch) for _ in range(2)]
        assert not losses[0].requires_grad
        assert all(p.grad is None for p in trainer.model.parameters())
    assert theirs.version == REWRITTEN
    expected = {True: stepped(model, batch, True), False: stepped(model, batch, False)}
    for trainer, clip in ((theirs, True), (plain, False)):
        pairs = zip(trainer.model.parameters(), expected[clip].parameters(), strict=True)
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted)
    groups = ours.optimizer.param_groups
    clipping = {id(p): group["clipping"] for group in groups for p in group["params"]}
    *body, weight, bias = map(id, ours.model.parameters())
    assert clipping == {**dict.fromkeys(body, training.CLIPPING), weight: 0, bias: 0}


def test_timm_clips_as_its_training_script_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    timm, utils = ModuleType("timm"), ModuleType("timm.utils")
    timm.__version__ = "9.9"  # type: ignore[attr-defined]  # a stand-in module
    utils.dispatch_clip_grad = lambda *args, **options: calls.append((args, options))  # type: ignore[attr-defined]  # a stand-in module
    for module in (timm, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _, theirs, _ = training.trainers(network(OWN).model)
    theirs.clip()
    (((params, value), options),) = calls
    assert theirs.version == "timm 9.9"
    assert (value, options) == (training.CLIPPING, {"mode": "agc"})
    *body, _weight, _bias = theirs.model.parameters()
    assert list(map(id, params)) == list(map(id, body))


def test_models_are_timms_where_timm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert default_network("cuda") == default_network("cpu") == OWN
    assert is_known(OWN)
    assert not is_known(DEFAULT)

    made = nn.Linear(2, 2)
    made.pretrained_cfg, made.num_classes = {"input_size": (3, 256, 256)}, 7  # type: ignore[assignment]
    timm = SimpleNamespace(is_model=lambda name: name == DEFAULT, create_model=lambda _: made)
    monkeypatch.setattr(networks, "imported", lambda _: timm)
    assert (default_network("cuda"), default_network("cpu")) == (DEFAULT, OWN)
    assert is_known(DEFAULT)
    assert not is_known("no_such")
    assert network(DEFAULT) == (made, 3, 192, 7)
    assert network(DEFAULT, 64).pixels == 64


def test_weights_and_images_are_alike_for_all(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    compared = training.trainers(network(OWN).model)
    first, *others = [trainer.step(*batch) for trainer in compared]
    assert all(torch.equal(first, other) for other in others)
    assert batch[0].shape == (4, 1, 8, 8)
    assert len({id(p) for trainer in compared for p in trainer.model.parameters()}) == 3 * 36


def test_all_take_turns_and_the_first_round_warms_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def time_turn(trainer: training.Trainer, *_: Any) -> tuple[float, float]:
        turns.append(trainer.implementation)
        return float(len(turns)), 1.0

    monkeypatch.setattr(training, "time_turn", time_turn)
    table = run(tmp_path / "rows.csv", "--batches", "2", "--turns", "9")
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all(Counter(one) == Counter(NAMES) for one in rounds)
    assert len(rounds) == 10
    assert len(set(map(tuple, rounds))) > 1
    assert sorted(table["images_per_s"]) == list(range(4, 31))


def test_a_killed_run_keeps_its_rows_and_what_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = training.measure

    def measure(name: str, of: Any, batch: int, args: Any) -> pd.DataFrame:
        if batch == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if batch == 4:
            raise KeyboardInterrupt
        return original(name, of, batch, args)

    monkeypatch.setattr(training, "measure", measure)
    out = tmp_path / "rows.csv"
    with pytest.raises(KeyboardInterrupt):
        run(out, "--batches", "2", "3", "4")
    assert set(pd.read_csv(out)["batch"]) == {2}
    assert f"{OWN}, batch 3 is left out: CUDA out of memory" in capsys.readouterr().out


def rows_of(rates: dict[str, list[float]]) -> pd.DataFrame:
    roles = dict(zip(NAMES, ("ours", "peer", "unclipped"), strict=True))
    common = {"model": "x", "pixels": 8, "batch": 2, "dtype": "bfloat16 autocast", "device": "y"}
    return pd.DataFrame(
        {**common, "implementation": name, "role": roles[name], "images_per_s": rate}
        for name, turns in rates.items()
        for rate in turns
    )


def test_a_summary_says_how_many_times_the_others(tmp_path: Path) -> None:
    table = rows_of({NAMES[0]: [30, 50, 40], NAMES[1]: [20, 20, 10], NAMES[2]: [50, 50, 50]})
    found = training.summarize(table).set_index("implementation")
    assert found[["median", "min", "max"]].to_numpy()[0].tolist() == [40, 30, 50]
    assert found["times_timm"].tolist() == [2, 1, 2.5]
    assert found["times_unclipped"].tolist() == [0.8, 0.4, 1]
    assert plots.training(table, tmp_path / "t.csv") == tmp_path / "t.png"
