"""units=: unit_dim by pattern, module, type or callable; layers stored (in, out)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agc_triton import SGD_AGC, param_groups


class Conv1D(nn.Module):
    """As transformers': a Linear stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def unit_dims(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    groups = param_groups(model, exclude_head=False, **arguments)
    return {name: group["unit_dim"] for group in groups for name in group["param_names"]}


def test_transformers_conv1d_is_stored_in_out() -> None:
    class Wider(Conv1D):
        pass

    named_alike = type("Conv1D", (nn.Linear,), {})(4, 6)
    model = nn.Sequential(Conv1D(6, 4), Wider(6, 4), named_alike)
    assert {n: d for n, d in unit_dims(model).items() if d} == {"0.weight": 1, "1.weight": 1}


def test_a_conv1d_steps_as_the_linear_that_it_is() -> None:
    torch.manual_seed(0)
    conv, linear, x = Conv1D(6, 4), nn.Linear(4, 6), torch.randn(8, 4)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    for layer in (conv, linear):
        optimizer = SGD_AGC(param_groups(layer, exclude_head=False), lr=1.0, clipping=0.01)
        layer(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(conv.weight.T, linear.weight)


MODEL = nn.ModuleDict(
    {"up": nn.ConvTranspose2d(4, 6, 3), "mix": nn.Linear(4, 4), "out": nn.Linear(4, 2)}
)


@pytest.mark.parametrize(
    ("units", "changed"),
    [
        ({"mix": 1}, {"mix.weight": 1, "mix.bias": 1}),
        ({"mix.w*": -1}, {"mix.weight": -1}),
        ({nn.ConvTranspose2d: 0}, {"up.weight": 0, "up.bias": 0}),
        ({MODEL["out"]: 1}, {"out.weight": 1, "out.bias": 1}),
        ({lambda name, p: p.dim() == 4: 2}, {"up.weight": 2}),
        ({"*.weight": 1, "out.weight": 0}, {"up.weight": 1, "mix.weight": 1, "out.weight": 0}),
        ({"up.weight": None}, {"up.weight": None}),
        ({"mix.weight": (0, 1)}, {"mix.weight": (0, 1)}),
        ({"mix.weight": "tensor"}, {"mix.weight": "tensor"}),
        (None, {}),
    ],
)
def test_units_by_pattern_module_type_and_callable(
    units: Any, changed: dict[str, int | None]
) -> None:
    assert unit_dims(MODEL, units=units) == unit_dims(MODEL) | changed


def test_units_have_the_errors_of_exclude() -> None:
    with pytest.raises(ValueError, match=r"units='mx' matches no.*near names: mix"):
        param_groups(MODEL, units={"mx": 1})
    with pytest.raises(ValueError, match=r"units=LSTM matches no module.*Linear"):
        param_groups(MODEL, units={nn.LSTM: 1})
    with pytest.raises(TypeError, match=r"units takes patterns.*not 3"):
        param_groups(MODEL, units={3: 1})
    with pytest.raises(TypeError, match=r"units takes a mapping.*not \['mix'\]"):
        param_groups(MODEL, units=["mix"])  # type: ignore[arg-type]  # wrong on purpose


def test_the_optimizer_checks_their_values() -> None:
    with pytest.raises(TypeError, match="unit_dim must be"):
        SGD_AGC(param_groups(MODEL, units={"mix": "rows"}, exclude_head=False), lr=0.1)
    with pytest.raises(ValueError, match=r"unit_dim 2 is out of range.*mix\.weight"):
        SGD_AGC(param_groups(MODEL, units={"mix": 2}, exclude_head=False), lr=0.1)
