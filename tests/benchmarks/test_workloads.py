"""Workloads have the shapes of real models and half of their units over the limit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lib import workloads

# Millions of parameters, as timm's results tables give them.
PUBLISHED = {
    "dm_nfnet_f0": 71.49,
    "dm_nfnet_f1": 132.63,
    "dm_nfnet_f2": 193.78,
    "dm_nfnet_f3": 254.92,
    "dm_nfnet_f4": 316.07,
    "dm_nfnet_f5": 377.21,
    "dm_nfnet_f6": 438.36,
    "nf_resnet50": 25.56,
    "resnet50": 25.56,
    "eca_nfnet_l0": 24.14,
    "convnext_base": 88.59,
    "vit_base_patch16_224": 86.57,
    "vit_large_patch16_224": 304.33,
}


def test_every_table_has_the_published_number_of_parameters() -> None:
    counted = {
        model: sum(torch.Size(shape).numel() for shape in workloads.load_shapes(model))
        for model in workloads.model_names()
    }
    assert {model: round(count / 1e6, 2) for model, count in counted.items()} == PUBLISHED


def test_half_of_the_units_are_over_their_limit() -> None:
    workload = workloads.random_workload("nf_resnet50")
    share = workloads.share_of_units_clipped(workload.params, workload.grads)
    assert share == pytest.approx(0.5, abs=0.01)


def test_share_of_units_clipped_counts_units() -> None:
    # Limits: 0.02 for each row of four ones, 0.01 * 1e-3 for the zero bias.
    params = [torch.ones(3, 4), torch.zeros(2)]
    grads = [torch.tensor([0.02, 0.0, 0.005]).unsqueeze(1).expand(3, 4), torch.full((2,), 1e-6)]
    assert workloads.share_of_units_clipped(params, grads) == 0.25


def test_workload_depends_on_the_seed_only(tiny_model: str) -> None:
    first, again, other = (workloads.random_workload(tiny_model, seed=s) for s in (0, 0, 1))
    for a, b, c in zip(first.grads, again.grads, other.grads, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
