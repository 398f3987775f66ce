"""Groups added later: bare parameters beside named ones, and options spelt almost right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from agc_triton import AGC, SGD_AGC, param_groups

MAKE: list[Callable[..., Optimizer]] = [
    lambda groups: SGD_AGC(groups, lr=0.1),
    lambda groups: AGC(SGD(groups, lr=0.1)),
]


class Net(nn.Module):
    """Its layers but the last are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4).requires_grad_(False)
        self.mix = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.stem(x)))
        return out


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("names", [True, False])
def test_unfrozen_parameters_are_added_as_they_are(make: Any, names: bool) -> None:
    net = Net()
    optimizer = make(param_groups(net, names=names))
    for layer in (net.mix, net.stem):
        layer.requires_grad_(True)
        optimizer.add_param_group({"params": layer.parameters(), "lr": 0.5})
    assert [("param_names" in g) for g in optimizer.param_groups] == [names] * 4
    if names:
        found = [name for g in optimizer.param_groups for name in g["param_names"]]
        assert len(set(found)) == len(found) == 6
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 0.5, 0.5]
    net(torch.ones(2, 4)).sum().backward()
    before = net.stem.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, net.stem.weight)


def test_one_list_of_named_and_bare_parameters_is_refused_as_torch_does() -> None:
    net = Net()
    with pytest.raises(ValueError, match="with/without names"):
        SGD_AGC([*param_groups(net), {"params": net.stem.parameters()}], lr=0.1)


@pytest.mark.parametrize("make", MAKE)
def test_one_bare_tensor_and_named_groups_are_added_too(make: Any) -> None:
    net = Net()
    optimizer = make(param_groups(net.head))
    optimizer.add_param_group({"params": net.stem.weight})
    optimizer.add_param_group({"params": [("second", net.mix.weight)]})
    assert [g["param_names"] for g in optimizer.param_groups[2:]] == [["unnamed.2.0"], ["second"]]
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {net.stem.bias}})


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("cliping", "clipping"),
        ("Clipping", "clipping"),
        ("agc_epsilon", "agc_eps"),
        ("agc-eps", "agc_eps"),
        ("unit_dims", "unit_dim"),
        ("unitdim", "unit_dim"),
    ],
)
def test_a_misspelt_option_is_an_error_that_says_what_was_meant(
    make: Any, key: str, meant: str
) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"'{key}' in parameter group 0; did you mean '{meant}'"):
        make([{"params": net.parameters(), key: 0.1}])
    optimizer = make([net.weight])
    with pytest.raises(ValueError, match=f"'{key}' in parameter group 1"):
        optimizer.add_param_group({"params": [net.bias], key: 0.1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", MAKE)
def test_other_keys_are_the_users_affair(make: Any) -> None:
    mine = {"lr_scale": 0.5, "eps": 1e-8, "clip": 1, "unit": "m", "gradient_clipping": 2, 7: 7}
    optimizer = make([{"params": nn.Linear(2, 2).parameters(), **mine}])
    assert optimizer.param_groups[0] | mine == optimizer.param_groups[0]
