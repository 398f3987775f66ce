"""The same groups come out whatever wraps the model: torch.compile, DDP, FSDP2, checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from agc_triton import param_groups


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    """Its head is found by running it, and no name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(6, 3)
        self.module = nn.Linear(4, 6)
        self.pos_embed = nn.Parameter(torch.zeros(2, 4))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(self.module(x + self.pos_embed).relu())
        return out


INPUTS = torch.zeros(2, 4)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def part_compiled(model: Net) -> nn.Module:
    model.module = compiled(model.module)
    return model


def checkpointed(model: Net) -> nn.Module:
    model.readout = checkpoint_wrapper(model.readout)  # type: ignore[assignment]
    return model


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "compiled": compiled,
    "compiled in place": lambda model: model.compile(backend="eager") or model,
    "DDP": DistributedDataParallel,
    "DDP, compiled": lambda model: compiled(DistributedDataParallel(model)),
    "compiled, DDP": lambda model: DistributedDataParallel(compiled(model)),
    "DataParallel": nn.DataParallel,
    "a compiled part": part_compiled,
    "a checkpointed part": checkpointed,
    "checkpointed": checkpoint_wrapper,
}


def rows(groups: list[dict[str, Any]]) -> list[Any]:
    """Groups with parameters as addresses: of DTensors, those of the wrapping objects."""
    return [{**g, "params": [id(p) for p in g["params"]]} for g in groups]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("inputs", [INPUTS, None], ids=["run", "traced"])
def test_the_same_groups(wrap: Callable[[Any], nn.Module], inputs: Tensor | None) -> None:
    model = Net()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        given: dict[str, Any] = {"example_inputs": inputs, "exclude": "module.bias"}
        return rows(param_groups(model, weight_decay=0.1, clipping=0.5, units={"mod*": 1}, **given))

    expected = groups(model)
    assert {n for g in expected if g["clipping"] == 0 for n in g["param_names"]} == {
        *("readout.weight", "readout.bias", "module.bias")
    }
    assert groups(wrap(model)) == expected


def named(groups: list[dict[str, Any]]) -> list[Any]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


@pytest.mark.usefixtures("alone")
def test_the_same_groups_after_sharding_and_after_forward_passes() -> None:
    model = Net()
    arguments: dict[str, Any] = {"weight_decay": 0.1, "example_inputs": INPUTS}
    expected = param_groups(model, **arguments)
    assert [g["param_names"] for g in expected if g.get("clipping") == 0] == [
        *(["readout.weight"], ["readout.bias"])
    ]
    fully_shard(model.module)
    fully_shard(model)
    sharded = list(map(id, model.parameters()))
    groups = param_groups(model, **arguments)
    assert named(groups) == named(expected)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(sharded)
    # The run left no gathered parameters; one of the user's own is no obstacle either.
    assert list(map(id, model.parameters())) == sharded
    with torch.no_grad():
        model.eval()(INPUTS)
    again = param_groups(model, **arguments)
    assert rows(again) == rows(groups)


@pytest.mark.usefixtures("alone")
def test_a_head_that_is_no_longer_found_after_sharding_is_an_error() -> None:
    model = Net()
    param_groups(model)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"cannot tell.*example_inputs"):
        param_groups(model)
