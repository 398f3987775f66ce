"""torch.distributed.checkpoint: torch.optim's classes and ours, on any number of ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agc_triton import AGC, AdamW_AGC
from tests.support.optimizers import EACH_WAY, NAMES, PAIRS, stateful
from tests.support.ranks import on_ranks
from tests.support.recorded import full
from tests.support.tensors import same, weight

FORMS = ("nested", "flattened")
# Who saved, and who goes on.
WAYS = ("torch to ours", "ours to torch", "ours to ours")
CASES = [
    *itertools.product(EACH_WAY, FORMS[:1], WAYS[:1]),
    *itertools.product(["SGD", "AdamW"], FORMS[:1], WAYS[1:2]),
    *itertools.product(["SGD", "AdamW"], FORMS[1:], WAYS[:2]),
    *itertools.product(["AdamW"], FORMS, WAYS[2:]),
]
LONG = [case for case in itertools.product(NAMES, FORMS, WAYS) if case not in CASES]
VARIANTS: list[dict[str, bool]] = [
    {},
    {"full_state_dict": True},
    # The first rank alone has it then, and the others get it from there.
    {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
    {"ignore_frozen_params": True},
    {"keep_submodule_prefixes": False},
    {"strict": False},
    {"flatten_optimizer_state_dict": True},
]


def optimizer_of(ours: bool, name: str, params: Any) -> Any:
    """Unclipped, ours goes on as torch's does; the first option shows that ours are kept."""
    cls = getattr(torch.optim, name)
    options = {**stateful(name), "lr": 0.05}
    if ours:
        cls, options = PAIRS[cls], {**options, "clipping": 0, "agc_eps": 0.25}
    return cls(params, **options)


def model_on(mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    fully_shard(net, mesh=mesh)
    return net


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    """The same data on every rank, so that their number is no matter."""
    for step in steps:
        net(weight((4, 6), device="cpu", seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def options_of(form: str) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=form == "flattened")


def on_this_rank(
    work: Callable[..., Any], cases: list[tuple[str, str, str]], folder: str, world: int, _rank: int
) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    return {str(case): work(mesh, f"{folder}/{'-'.join(case)}", *case) for case in cases}


def saving(mesh: Any, folder: str, name: str, form: str, way: str) -> list[Tensor]:
    """Two steps, a checkpoint, and where a third one leads."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    net = model_on(mesh)
    optimizer = optimizer_of(way.startswith("ours"), name, net.parameters())
    train(net, optimizer, range(2))
    model, states = get_state_dict(net, optimizer, options=options_of(form))
    save({"model": model, "optim": states}, checkpoint_id=folder)
    train(net, optimizer, range(2, 3))
    return [full(p) for p in net.parameters()]


def resuming(mesh: Any, folder: str, name: str, form: str, way: str) -> list[Any]:
    """The recipe of docs/distributed.md."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    net = model_on(mesh)
    optimizer = optimizer_of(way.endswith("ours"), name, net.parameters())
    model, states = get_state_dict(net, optimizer, options=options_of(form))
    loaded: dict[str, Any] = {"model": model, "optim": states}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    load(loaded, checkpoint_id=folder, planner=planner)
    set_state_dict(
        net,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optim"],
        options=options_of(form),
    )
    train(net, optimizer, range(2, 3))
    (group,) = optimizer.param_groups
    return [[full(p) for p in net.parameters()], group.get("agc_eps")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """Checkpoints of two ranks, and what each ends with."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    work = partial(on_this_rank, saving, CASES, folder, 2)
    return folder, on_ranks(work, tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.parametrize("world", [1, 4])
def test_another_number_of_ranks_goes_on(
    saved: tuple[str, list[Any]], world: int, tmp_path: Path
) -> None:
    folder, (before, _) = saved
    check_resumed(CASES, before, folder, world, tmp_path)


@pytest.mark.soak
def test_every_optimizer_in_every_form(tmp_path: Path) -> None:
    ranks, checkpoints = tmp_path / "ranks", str(tmp_path / "checkpoints")
    ranks.mkdir()
    before, _ = on_ranks(partial(on_this_rank, saving, LONG, checkpoints, 2), ranks, 2)
    check_resumed(LONG, before, checkpoints, 1, tmp_path)


def check_resumed(
    cases: list[tuple[str, str, str]], before: Any, folder: str, world: int, tmp_path: Path
) -> None:
    work = partial(on_this_rank, resuming, cases, folder, world)
    for each in on_ranks(work, tmp_path, world):
        for case in cases:
            values, agc_eps = each[str(case)]
            torch.testing.assert_close(values, before[str(case)], rtol=2e-6, atol=2e-6)
            assert agc_eps == (0.25 if case[2].endswith("ours") else None)


def handed_over(_rank: int) -> list[Any]:
    """Weights of an optimizer, and of others that got its state in every way there is."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    makes: list[Callable[[Any], Any]] = [
        lambda params: AdamW_AGC(params, lr=0.05, clipping=0.05),
        lambda params: AGC(torch.optim.AdamW(params, lr=0.05), clipping=0.05),
    ]
    found = []
    # The wrapper hands its base over: two of them show it.
    pairs = [*itertools.product(makes[:1], VARIANTS), *itertools.product(makes[1:], VARIANTS[-2:])]
    for make, variant in pairs:
        options = StateDictOptions(**variant)
        nets = [model_on(mesh) for _ in range(2)]
        optimizers = [make(net.parameters()) for net in nets]
        bases = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        train(nets[0], optimizers[0], range(2))
        states = copy.deepcopy(get_optimizer_state_dict(nets[0], bases[0], options=options))
        set_optimizer_state_dict(nets[1], bases[1], states, options=options)
        with torch.no_grad():
            for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                b.copy_(a)
        for net, optimizer in zip(nets, optimizers, strict=True):
            train(net, optimizer, range(2, 4))
        found.append([[full(p) for p in net.parameters()] for net in nets])
    return found


def test_every_option_of_a_state_dict(tmp_path: Path) -> None:
    for each in on_ranks(handed_over, tmp_path, 2):
        assert len(each) == len(VARIANTS) + 2
        differ = [i for i, (expected, found) in enumerate(each) if not same(expected, found)]
        assert not differ
