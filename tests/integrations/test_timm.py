"""timm's models: heads, no_weight_decay(), layer-wise lr decay."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from agc_triton import SGD_AGC, param_groups

NARROW = {"embed_dim": 32, "num_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, **NARROW},
    "deit_tiny_distilled_patch16_224": {
        "img_size": 32,
        "depth": 2,
        "num_heads": 2,
        "embed_dim": 32,
    },
    "beit_base_patch16_224": {"img_size": 32, "depth": 1, **NARROW},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1), "embed_dim": 32},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1)},
    "mixer_s32_224": {},
    "resnet18": {},
    "nf_resnet26": {},
}


def make(name: str) -> Any:
    return timm.create_model(name, pretrained=False, num_classes=5, **SMALL[name])


def named(groups: list[dict[str, Any]], **options: float) -> set[str]:
    """Parameters of groups with these options."""
    found = [g for g in groups if all(g.get(key) == options[key] for key in options)]
    return {name for group in found for name in group["param_names"]}


@pytest.mark.parametrize("name", SMALL)
def test_the_classifier_is_not_clipped(name: str) -> None:
    model = make(name)
    unclipped = named(param_groups(model), clipping=0.0)
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 5]
    assert unclipped == {f"{layer}.{tensor}" for layer in last for tensor in ("weight", "bias")}


@pytest.mark.parametrize("name", SMALL)
def test_decayed_is_what_timm_decays_but_for_gains_and_bias_tables(name: str) -> None:
    model = make(name)
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed)
    decayed = {id(p) for g in theirs if g["weight_decay"] for p in g["params"]}
    groups = param_groups(model, weight_decay=0.1)
    ours = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert ours <= decayed
    more = {n for n, p in model.named_parameters() if id(p) in decayed - ours}
    assert all("bias" in n or "gain" in n for n in more)


@pytest.mark.parametrize("name", SMALL)
def test_layer_decay_and_an_unclipped_head_together(name: str) -> None:
    model = make(name)
    given = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    groups = param_groups(model, groups=given)
    options = {id(p): (g["lr_scale"], g["weight_decay"]) for g in given for p in g["params"]}
    kept = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert kept == options
    assert named(groups, clipping=0.0) == named(param_groups(model), clipping=0.0)


def test_training() -> None:
    torch.manual_seed(0)
    model = make("vit_tiny_patch16_224")
    given = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay())
    optimizer = SGD_AGC(param_groups(model, groups=given), lr=0.1, momentum=0.9, clipping=0.1)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = []
    for _ in range(10):
        loss: Any = nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
