"""What is decayed: by layer and tensor name first, by shape only where these do not tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from agc_triton import param_groups


def undecayed(model: nn.Module, **arguments: Any) -> set[str]:
    groups = param_groups(model, weight_decay=0.1, exclude_head=False, **arguments)
    return {name for g in groups if g["weight_decay"] == 0.0 for name in g["param_names"]}


ONE_CHANNEL: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(1, 16),
    lambda: nn.Linear(8, 1),
    lambda: nn.Linear(1, 1),
    lambda: nn.Bilinear(1, 1, 4),
    lambda: nn.Conv1d(1, 8, 1),
    lambda: nn.Conv2d(1, 1, (1, 3)),
    lambda: nn.Conv3d(8, 1, 1),
    lambda: nn.ConvTranspose2d(1, 8, 1),
    lambda: nn.Conv2d(8, 8, 1, groups=8),
    lambda: nn.Embedding(7, 1),
    lambda: nn.EmbeddingBag(1, 7),
    lambda: nn.LSTM(1, 3, 2, bidirectional=True, proj_size=1),
    lambda: nn.GRU(1, 1),
    lambda: nn.LSTMCell(1, 1),
    lambda: nn.MultiheadAttention(1, 1, kdim=2, vdim=1, add_bias_kv=True),
]


@pytest.mark.parametrize("make", ONE_CHANNEL)
def test_layers_of_one_channel_have_weights(make: Callable[[], nn.Module]) -> None:
    layer = make()
    assert undecayed(layer) == {n for n, _ in layer.named_parameters() if "bias" in n}


def test_layers_of_other_packages_are_told_by_their_names() -> None:
    class DeformConv2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 1, 1, 1))
            self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))

    class LayerNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 8, 1, 1))

    class CohereLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))

    model = nn.Sequential(DeformConv2d(), LayerNorm2d(), CohereLayerNorm())
    assert undecayed(model) == {"0.gain", "1.weight", "2.weight"}


def test_gains_within_layers_and_parameters_of_no_known_layer_go_by_shape() -> None:
    class ScaledStdConv2d(nn.Conv2d):  # as in timm
        def __init__(self) -> None:
            super().__init__(1, 8, 1)
            self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))

    model = nn.ModuleDict({"conv": ScaledStdConv2d(), "prelu": nn.PReLU(4)})
    for name, shape in {"scale": (), "gamma": (8,), "token": (1, 1, 8), "table": (3, 8)}.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    assert undecayed(model) == {
        *("conv.bias", "conv.gain", "prelu.weight", "scale", "gamma", "token"),
    }


def test_weight_norm_has_a_gain_and_a_direction() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(1, 8, 1))
    assert undecayed(layer) == {"bias", "parametrizations.weight.original0"}
    with pytest.warns(FutureWarning, match="deprecated"):
        older = nn.utils.weight_norm(nn.Linear(1, 8))
    assert undecayed(older) == {"bias", "weight_g"}


def test_other_parametrizations_stand_for_their_weight_or_go_by_shape() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tilt = nn.Parameter(torch.ones(8, 1))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a * b * self.tilt

        def right_inverse(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return w, torch.ones_like(w[:, :1])

    assert undecayed(parametrizations.orthogonal(nn.Linear(8, 1))) == {"bias"}
    layer = nn.Linear(4, 8)
    parametrize.register_parametrization(layer, "weight", Product())
    assert undecayed(layer) == {
        "bias",
        "parametrizations.weight.original1",
        "parametrizations.weight.0.tilt",
    }


class Tokens(nn.Module):
    """As timm's vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 8))
        self.cls_token = nn.Parameter(torch.ones(1, 2, 8))
        self.fc = nn.Linear(8, 3)

    def no_weight_decay(self) -> set[str]:
        return {"pos_*", "cls_token", "dist_token"}


def test_the_models_own_no_weight_decay_is_heeded_wherever_the_model_is() -> None:
    expected = {"pos_embed", "cls_token", "fc.bias"}
    assert undecayed(Tokens()) == expected
    assert undecayed(torch.compile(Tokens(), backend="eager")) == expected  # type: ignore[arg-type]
    inside = nn.ModuleDict({"student": Tokens(), "other": nn.Linear(2, 2)})
    assert undecayed(inside) == {f"student.{name}" for name in expected} | {"other.bias"}


@pytest.mark.parametrize(
    ("no_decay", "expected"),
    [
        ("table", {"table"}),
        ("*.weight", {"fc.weight"}),
        (nn.Linear, {"fc.weight"}),
        ([lambda name, p: p.dim() == 2, "table"], {"fc.weight", "table"}),
        (None, set()),
    ],
)
def test_no_decay_takes_what_exclude_takes(no_decay: Any, expected: set[str]) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 3)})
    model.register_parameter("table", nn.Parameter(torch.ones(3, 3, 3)))
    assert undecayed(model, no_decay=no_decay) == expected | {"fc.bias"}
    assert undecayed(model, no_decay=model["fc"]) == {"fc.weight", "fc.bias"}


def test_no_decay_has_the_errors_of_exclude() -> None:
    with pytest.raises(ValueError, match=r"no_decay='wieght' matches no.*near names: weight"):
        param_groups(nn.Linear(2, 2), no_decay="wieght")
    with pytest.raises(TypeError, match=r"no_decay takes patterns.*not 3"):
        param_groups(nn.Linear(2, 2), no_decay=3)  # type: ignore[arg-type]  # wrong on purpose
