"""param_groups: units by layer type, the head and exclusions unclipped, what is decayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD

from agc_triton import AGC, param_groups
from tests.support.checks import clipped
from tests.support.optimizers import OURS, PAIRS
from tests.support.tensors import set_grads


def options(model: nn.Module, **arguments: Any) -> dict[str, dict[str, Any]]:
    """Each parameter's name and the options of its group."""
    groups = param_groups(model, **arguments)
    return {
        name: {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in groups
        for name in group["param_names"]
    }


def unclipped(model: nn.Module, **arguments: Any) -> set[str]:
    return {name for name, o in options(model, **arguments).items() if o.get("clipping") == 0}


def decayed(model: nn.Module) -> set[str]:
    found = options(model, weight_decay=0.1, exclude_head=False)
    return {name for name, o in found.items() if o["weight_decay"] == 0.1}


class Net(nn.Module):
    """Defined in another order than it runs; parameters of a norm come last."""

    def __init__(self, head: str = "fc") -> None:
        super().__init__()
        self.add_module(head, nn.Linear(6, 3))
        self.stem = nn.Conv2d(3, 6, 3)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.BatchNorm2d(6)
        self.head_name = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).mean((2, 3))
        x = self.get_submodule(self.head_name)(self.mix(x).relu())
        return x


HEAD = {"fc.weight", "fc.bias"}


# Units are what makes one output channel (or one row of a table): layer, input, output channel dim.
LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...], int]] = [
    (lambda: nn.Linear(5, 4), (2, 5), 1),
    (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7), 1),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), 1),
    (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 7, 7), 1),
    (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3), 1),
    (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 7), 1),
    (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 7, 7), 1),
    (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3), 1),
    (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 7, 7), 1),
]


@pytest.mark.parametrize(("make", "shape", "channels"), LAYERS)
def test_a_unit_is_what_makes_one_output_channel(
    make: Callable[[], nn.Module], shape: tuple[int, ...], channels: int
) -> None:
    torch.manual_seed(0)
    layer = make()
    inputs = torch.randn(shape)
    dim = options(layer, exclude_head=False)["weight"]["unit_dim"] or 0
    weight = layer.get_parameter("weight")
    before = layer(inputs)
    for unit in range(weight.shape[dim]):
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            changed.get_parameter("weight").select(dim, unit).add_(1.0)
        others = [d for d in range(before.dim()) if d != channels]
        moved = (changed(inputs) - before).abs().sum(others) > 1e-4
        assert moved.nonzero().flatten().tolist() == [unit]


def test_unit_dim_of_grouped_transposed_convolutions_tables_and_attention() -> None:
    model = nn.ModuleDict(
        {
            "grouped": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "table": nn.Embedding(5, 4),
            "bag": nn.EmbeddingBag(5, 4),
            "attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "lstm": nn.LSTM(4, 3),
        }
    )
    found = {name: o["unit_dim"] or 0 for name, o in options(model, exclude_head=False).items()}
    # Its channels are spread over (in, out / groups).
    assert found.pop("grouped.weight") == ((0, 2), 1)
    assert set(found.values()) == {0}
    assert {"attention.q_proj_weight", "attention.out_proj.weight", "table.weight"} < set(found)


def test_what_is_one_unit_anyway_needs_no_unit_dim_of_its_own() -> None:
    found = options(nn.ConvTranspose2d(1, 4, 1, bias=True), exclude_head=False)
    assert found["weight"]["unit_dim"] == found["bias"]["unit_dim"]


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("stem", {"stem.weight", "stem.bias"}),
        ("stem.*", {"stem.weight", "stem.bias"}),
        ("*.bias", {"fc.bias", "stem.bias", "mix.bias", "norm.bias"}),
        ("norm.w?ight", {"norm.weight"}),
        (nn.Conv2d, {"stem.weight", "stem.bias"}),
        (nn.Linear, {"mix.weight", "mix.bias", *HEAD}),
        (lambda name, p: p.dim() == 4, {"stem.weight"}),
        (["stem.bias", nn.BatchNorm2d], {"stem.bias", "norm.weight", "norm.bias"}),
        ((lambda name, p: name == "mix.bias",), {"mix.bias"}),
        ((), set()),
    ],
)
def test_exclusions_by_pattern_type_and_callable(exclude: Any, expected: set[str]) -> None:
    assert unclipped(Net(), exclude=exclude, exclude_head=False) == expected
    assert unclipped(Net(), exclude=exclude) == expected | HEAD


@pytest.mark.parametrize(
    ("exclude", "near"),
    [("sten", "stem"), ("mix.wieght", "mix.weight"), (["stem", "nrom.*"], "norm"), ("", "stem")],
)
def test_a_pattern_that_matches_nothing_lists_near_names(exclude: Any, near: str) -> None:
    with pytest.raises(ValueError, match="matches no") as caught:
        param_groups(Net(), exclude=exclude)
    missed = exclude if isinstance(exclude, str) else exclude[-1]
    assert repr(missed) in str(caught.value)
    assert near in str(caught.value).partition("near names")[2]


def test_a_module_stands_for_its_parameters() -> None:
    model = Net()
    assert unclipped(model, exclude=model.stem) == {"stem.weight", "stem.bias"} | HEAD
    assert unclipped(model, exclude=[model.stem, "norm.bias"], exclude_head=False) == {
        *("stem.weight", "stem.bias", "norm.bias")
    }
    layers = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert unclipped(layers, exclude=layers[0], exclude_head=False) == {"0.0.weight", "0.0.bias"}
    with pytest.raises(ValueError, match=r"Conv2d that is no module of this model"):
        param_groups(Net(), exclude=model.stem)


def test_no_exclusion_is_none() -> None:
    assert unclipped(Net(), exclude=None) == HEAD


@pytest.mark.parametrize(
    ("exclude", "called"),
    [(123, "123"), ([123], "123"), (["stem", None], "None"), ([torch.ones(2)], "tensor")],
)
def test_what_is_no_exclusion_is_named(exclude: Any, called: str) -> None:
    with pytest.raises(TypeError, match=f"patterns.*not {called}"):
        param_groups(Net(), exclude=exclude)


def test_a_module_type_that_matches_nothing_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm.*BatchNorm2d.*Conv2d.*Linear"):
        param_groups(Net(), exclude=nn.LayerNorm)


def test_biases_gains_and_norms_are_not_decayed() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "batch": nn.BatchNorm2d(4),
            "layer": nn.LayerNorm([4, 5]),
            "group": nn.GroupNorm(2, 4),
            "instance": nn.InstanceNorm2d(4, affine=True),
            "rms": nn.RMSNorm([4, 5]),
            "prelu": nn.PReLU(4),
            "lstm": nn.LSTM(4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "table": nn.Embedding(5, 4),
            "debias": nn.Linear(4, 4),
        }
    )
    model.register_parameter("gain", nn.Parameter(torch.ones(4, 1, 1, 1)))
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.register_parameter("position", nn.Parameter(torch.ones(1, 7, 4)))
    assert decayed(model) == {
        "conv.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "table.weight",
        "debias.weight",
        "position",
    }


@pytest.mark.parametrize("make", [lambda layer: layer, nn.Sequential])
def test_parametrized_weights_are_treated_as_the_layers(make: Any) -> None:
    model = make(parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3)))
    (direction,) = decayed(model)
    assert direction.endswith("parametrizations.weight.original1")
    assert options(model, exclude_head=False)[direction]["unit_dim"] == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 9)
        self.table = nn.Embedding(9, 4)
        self.table.weight = self.decoder.weight


def test_shared_parameters_appear_once_under_any_of_their_names() -> None:
    model = Tied()
    groups = param_groups(model, exclude_head=False)
    assert sum(len(group["params"]) for group in groups) == 2
    for exclude in ("decoder.weight", "table.weight", "table", nn.Embedding):
        assert unclipped(model, exclude=exclude, exclude_head=False) == {"decoder.weight"}


def test_frozen_parameters_are_left_out() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    assert set(options(model)) == {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"Net.*requires a gradient"):
        param_groups(model.requires_grad_(False))


# Older versions of torch warn of every lazy module.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_uninitialized_parameters_are_an_error() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight.*uninitialized"):
        param_groups(model)


def test_options_that_are_not_given_are_the_optimizers() -> None:
    optimizer = OURS[0](param_groups(Net()), clipping=0.5, agc_eps=0.25, weight_decay=0.125)
    found = {g["param_names"][0]: g for g in optimizer.param_groups}
    assert {g["agc_eps"] for g in found.values()} == {0.25}
    assert [(g["clipping"], g["weight_decay"]) for g in found.values()] == [
        (0.0, 0.125),
        (0.0, 0.0),
        (0.5, 0.125),
        (0.5, 0.0),
    ]


def test_options_that_are_given_hold_for_their_groups() -> None:
    found = options(Net(), clipping=0.5, agc_eps=0.25, weight_decay=0.125)
    shared = {"agc_eps": 0.25, "unit_dim": found["stem.weight"]["unit_dim"]}
    assert found["stem.weight"] == {"clipping": 0.5, "weight_decay": 0.125, **shared}
    assert found["stem.bias"] == {"clipping": 0.5, "weight_decay": 0.0, **shared}
    assert found["fc.weight"] == {"clipping": 0.0, "weight_decay": 0.125, **shared}
    assert found["fc.bias"] == {"clipping": 0.0, "weight_decay": 0.0, **shared}


@pytest.mark.parametrize("make", [*PAIRS.values(), *PAIRS, lambda groups: AGC(SGD(groups))])
def test_groups_are_ready_for_any_optimizer(make: Any) -> None:
    model = Net()
    optimizer = make(param_groups(model, clipping=0.5, weight_decay=0.1))
    held = [
        (n, p)
        for g in optimizer.param_groups
        for n, p in zip(g["param_names"], g["params"], strict=True)
    ]
    assert {name: id(p) for name, p in held} == {n: id(p) for n, p in model.named_parameters()}
    assert len(held) == len(list(model.parameters()))
    set_grads(list(model.parameters()), 0)
    optimizer.step()


def test_one_step_clips_all_but_the_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("up", nn.ConvTranspose2d(3, 4, 3))
    model.add_module("head", nn.Linear(4, 2))
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = OURS[0](param_groups(model, clipping=0.01), lr=1.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None
        moved = before[name].detach() - p.detach()
        limit = clipped(before[name].detach(), p.grad, 0.01, unit_dim=min(1, p.dim() - 1))
        expected = p.grad if name.startswith("head") else limit
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
