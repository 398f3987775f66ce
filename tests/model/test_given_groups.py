"""Groups that somebody else made keep their options and are split by what AGC needs only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from agc_triton import SGD_AGC, param_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.up = nn.ConvTranspose1d(6, 6, 3)
        self.fc = nn.Linear(6, 2)

    def no_weight_decay(self) -> set[str]:
        return {"stem.weight"}


def by_layer(model: Net) -> list[dict[str, Any]]:
    """As layer-wise lr decay makes them."""
    layers = (model.stem, model.up, model.fc)
    return [
        {"params": list(layer.parameters()), "weight_decay": 0.05, "lr_scale": 0.5 ** (2 - i)}
        for i, layer in enumerate(layers)
    ]


def rows(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("lr_scale", "weight_decay", "clipping", "unit_dim")
    return [(g["param_names"], *(g.get(key) for key in keys)) for g in groups]


def test_layer_decay_and_an_unclipped_head_together() -> None:
    model = Net()
    assert rows(param_groups(model, groups=by_layer(model))) == [
        (["stem.weight", "stem.bias"], 0.25, 0.05, None, None),
        (["up.weight"], 0.5, 0.05, None, 1),
        (["up.bias"], 0.5, 0.05, None, None),
        (["fc.weight", "fc.bias"], 1.0, 0.05, 0.0, None),
    ]


def test_what_names_a_parameter_goes_before_its_group_and_that_before_the_rest() -> None:
    model = Net()
    given: Any = [
        {"params": model.stem.parameters(), "clipping": 0.5, "unit_dim": 1},
        {"params": [*model.up.parameters(), *model.fc.parameters()]},
    ]
    groups = param_groups(
        model, groups=given, clipping=0.1, agc_eps=0.2, exclude="stem.bias", units={"up": 0}
    )
    assert [(g["param_names"], g["clipping"], g["agc_eps"], g["unit_dim"]) for g in groups] == [
        (["stem.weight"], 0.5, 0.2, 1),
        (["stem.bias"], 0.0, 0.2, 1),
        (["up.weight", "up.bias"], 0.1, 0.2, 0),
        (["fc.weight", "fc.bias"], 0.0, 0.2, None),
    ]


def test_all_of_a_groups_options_are_kept_and_the_given_groups_as_they_were() -> None:
    model, marker = Net(), [object()]
    given = [{"params": list(model.parameters()), "lr": 0.5, "betas": [0.1, 0.2], "mine": marker}]
    before = dict(given[0])
    for group in param_groups(model, groups=given, exclude_head=False):
        assert (group["lr"], group["betas"], group["mine"]) == (0.5, [0.1, 0.2], marker)
        assert group["mine"] is marker
        assert "weight_decay" not in group
    assert given == [before]


def test_any_form_that_torch_takes_and_frozen_parameters() -> None:
    model = Net()
    model.stem.requires_grad_(False)
    given: Any = [
        {"params": model.stem.weight},
        {"params": (p for p in [model.stem.bias])},
        {"params": [("mine", model.fc.weight)]},
        {"params": [model.fc.bias], "param_names": ["own"]},
        {"params": []},
    ]
    groups = param_groups(model, groups=given)
    assert [g["param_names"] for g in groups] == [["stem.weight"], ["stem.bias"], ["mine"], ["own"]]
    assert [id(p) for g in groups for p in g["params"]] == [
        id(p) for p in (model.stem.weight, model.stem.bias, model.fc.weight, model.fc.bias)
    ]


def test_a_step_of_given_groups() -> None:
    model = Net()
    optimizer = SGD_AGC(param_groups(model, groups=by_layer(model)), lr=1.0, clipping=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.fc.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.fc.bias.detach(), before - 1.0 - 0.05 * before)


@pytest.mark.parametrize("decay", [{"weight_decay": 0.0}, {"no_decay": "stem"}])
def test_groups_have_their_own_weight_decay(decay: Any) -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"groups keep the weight decay they have.*leave out"):
        param_groups(model, groups=by_layer(model), **decay)


def test_parameters_of_another_model_are_named() -> None:
    model = Net()
    given: Any = [
        {"params": model.stem.parameters()},
        {"params": [("it", nn.Parameter(torch.ones(3)))]},
    ]
    with pytest.raises(ValueError, match=r"groups\[1\].*parameter 0 \('it'\), shape \(3,\).*Net"):
        param_groups(model, groups=given)


@pytest.mark.parametrize("groups", [[nn.Parameter(torch.ones(3))], [{"lr": 0.1}], ["stem"]])
def test_what_is_no_group_is_named(groups: Any) -> None:
    with pytest.raises(TypeError, match="groups takes dicts with 'params'"):
        param_groups(Net(), groups=groups)


def test_groups_without_parameters_are_an_error() -> None:
    nothing: list[Any] = [[], [{"params": []}]]
    for groups in nothing:
        with pytest.raises(ValueError, match="groups has no parameters"):
            param_groups(Net(), groups=groups)


def test_a_misspelt_option_is_named() -> None:
    model = Net()
    given = [{"params": model.parameters(), "agc_esp": 0.1}]
    with pytest.raises(ValueError, match=r"'agc_esp' in groups\[0\]; did you mean 'agc_eps'"):
        param_groups(model, groups=given)


def test_parameters_in_place_of_the_model_are_an_error_that_says_so() -> None:
    model = Net()
    for wrong in (model.parameters(), model.named_parameters(), by_layer(model), model.state_dict):
        with pytest.raises(TypeError, match=r"takes the model itself, not.*groups="):
            param_groups(wrong)  # type: ignore[arg-type]  # wrong on purpose
