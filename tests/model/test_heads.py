"""Heads of transformers' models, told by their interface; stand-ins, no transformers needed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agc_triton import param_groups
from agc_triton.model.head import find_head


class Encoder(nn.Module):
    """A model without any head, such as BertModel."""

    base_model_prefix = "bert"

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(9, 4)
        self.layer = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)

    @property
    def base_model(self) -> Any:
        return getattr(self, self.base_model_prefix, self)

    def get_output_embeddings(self) -> Any:
        return None

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 0:  # no tracing
            raise ValueError
        pooled: Tensor = self.pooler(self.layer(self.embeddings(x).mean(1)).relu())
        return pooled


class Task(Encoder):
    """A base model and what a task puts beside it."""

    def __init__(self, **beside: nn.Module) -> None:
        nn.Module.__init__(self)
        self.bert = Encoder()
        for name, module in beside.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bert(x)
        for module in list(self.children())[1:]:
            x = module(x)
        return x


class MaskedLM(Task):
    def __init__(self) -> None:
        cls = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
        super().__init__(cls=cls)
        self.get_submodule("cls.2").weight = self.bert.embeddings.weight

    def get_output_embeddings(self) -> Any:
        return self.get_submodule("cls.2")


def unclipped(model: nn.Module, **arguments: Any) -> set[str]:
    groups = param_groups(model, **arguments)
    return {name for g in groups if g.get("clipping") == 0 for name in g["param_names"]}


def test_output_embeddings_and_with_them_the_input_embeddings_they_share() -> None:
    assert unclipped(MaskedLM()) == {"bert.embeddings.weight", "cls.2.bias"}


def test_several_output_embeddings() -> None:
    class Several(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.ModuleList([nn.Linear(4, 9, bias=False) for _ in range(2)])

        def get_output_embeddings(self) -> Any:
            return self.out

    assert unclipped(Several()) == {"out.0.weight", "out.1.weight"}


def block(*sizes: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


class DecodeHead(nn.Module):
    """As Segformer's and UperNet's: the classifier is not the last to be defined."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.classifier = nn.Conv2d(4, 3, 1)
        self.fuse = nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (Task(dropout=nn.Dropout(), classifier=nn.Linear(4, 3)), ["classifier"]),
        (Task(qa_outputs=nn.Linear(4, 2)), ["qa_outputs"]),
        (Task(score=nn.Linear(4, 1, bias=False)), ["score"]),
        (Task(pre_classifier=nn.Linear(4, 4), classifier=nn.Linear(4, 3)), ["classifier"]),
        (Task(projector=nn.Linear(4, 4), classifier=block(4, 4, 3)), ["classifier.1"]),
        (Task(classification_head=block(4, 4, 3)), ["classification_head.1"]),
        (Task(decode_head=DecodeHead()), ["decode_head.classifier"]),
        (Task(sequence_summary=block(4, 3)), ["sequence_summary.0"]),
        (Task(labels=nn.Linear(4, 3), boxes=block(4, 4, 4)), ["labels", "boxes.1"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_heads_beside_the_base_model(model: Task, heads: list[str]) -> None:
    assert find_head(model) == [model.get_submodule(name) for name in heads]


def test_models_that_end_in_projections() -> None:
    class Clip(Encoder):
        base_model_prefix = "clip"

        def __init__(self) -> None:
            super().__init__()
            self.visual_projection = nn.Linear(4, 2, bias=False)
            self.text_projection = nn.Linear(4, 2, bias=False)

    assert unclipped(Clip()) == {"visual_projection.weight", "text_projection.weight"}


def test_a_model_without_a_head_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"Encoder shows no head.*exclude_head=False is all"):
        param_groups(Encoder())
    assert unclipped(Encoder(), exclude_head=False) == set()
    inputs = torch.zeros(1, 3, dtype=torch.long)
    assert unclipped(Encoder(), example_inputs=inputs) == {"pooler.weight", "pooler.bias"}


def test_the_head_within_a_module_that_only_holds_the_model() -> None:
    class Timm(nn.Sequential):
        def get_classifier(self) -> nn.Module:
            return self[0]

    for inner, head in (
        (Timm(nn.Linear(4, 2), nn.Linear(2, 2)), "model.0"),
        (Task(qa_outputs=nn.Linear(4, 2)), "model.qa_outputs"),
    ):
        held = nn.ModuleDict({"model": inner, "loss": nn.CrossEntropyLoss()})
        assert unclipped(held) == {f"{head}.weight", f"{head}.bias"}
        with_its_own = nn.ModuleDict({"model": inner})
        with_its_own.register_parameter("readout", nn.Parameter(torch.ones(2, 2)))
        with pytest.raises(ValueError, match="cannot tell"):
            param_groups(with_its_own)


def test_inputs_that_reach_no_linear_are_an_error() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = block(2, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"none of Lazy's 2 Linear.*ran on example_inputs"):
        param_groups(Lazy(), example_inputs=torch.zeros(2))
