"""The recipes of docs/integrations.md, run as they stand."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.markdown import ROOT, run_examples

RECIPES = ROOT / "docs" / "integrations.md"


def sections() -> list[str]:
    """The headings of all recipes."""
    return re.findall(r"^## (.*)$", RECIPES.read_text(), re.MULTILINE)


def run_recipe(heading: str, **names: Any) -> dict[str, Any]:
    """The names there are after a section's examples, which may use those given."""
    (section,) = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)",
        RECIPES.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    known: dict[str, Any] = {"criterion": nn.functional.cross_entropy, "torch": torch, **names}
    return run_examples(section, known)


def network(device: str = "cpu") -> nn.Sequential:
    """A small classifier, always with the same weights."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(device)


def batches_of(n: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels that can be learned."""
    rng = torch.Generator("cpu").manual_seed(0)
    found = []
    for _ in range(n):
        labels = torch.randint(3, (8,), generator=rng, device="cpu")
        inputs = torch.randn(8, 4, generator=rng, device="cpu")
        inputs[torch.arange(8), labels] += 2.0
        found.append((inputs.to(device), labels.to(device)))
    return found


def loss_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The mean loss over batches."""
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(inputs), labels) for inputs, labels in batches]
    return float(torch.stack(losses).mean())
