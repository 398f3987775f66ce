"""transformers' models, made from small configurations, and its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from agc_triton import AdamW_AGC, param_groups

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "num_labels": 3,
}
CLIP_PART = {key: value for key, value in SIZES.items() if key != "num_labels"}
CONFIGS: dict[str, Any] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 32},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "num_labels": 3},
    "Llama": SIZES | {"num_key_value_heads": 2, "pad_token_id": 0},
    "T5": {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32},
    "ViT": SIZES | {"image_size": 32},
    "Segformer": {"hidden_sizes": [8] * 4, "depths": [1] * 4, "decoder_hidden_size": 8},
    "CLIP": {
        "text_config": CLIP_PART,
        "vision_config": CLIP_PART | {"image_size": 32},
        "projection_dim": 8,
    },
}
HEADS = {
    "BertForMaskedLM": {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
    "BertForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
    "BertForSequenceClassification": {"classifier.weight", "classifier.bias"},
    "BertForTokenClassification": {"classifier.weight", "classifier.bias"},
    "BertForMultipleChoice": {"classifier.weight", "classifier.bias"},
    "BertForNextSentencePrediction": {"cls.seq_relationship.weight", "cls.seq_relationship.bias"},
    "RobertaForSequenceClassification": {"classifier.out_proj.weight", "classifier.out_proj.bias"},
    "DistilBertForSequenceClassification": {"classifier.weight", "classifier.bias"},
    "GPT2LMHeadModel": {"transformer.wte.weight"},
    "GPT2ForSequenceClassification": {"score.weight"},
    "LlamaForCausalLM": {"lm_head.weight"},
    "T5ForConditionalGeneration": {"shared.weight"},
    "ViTForImageClassification": {"classifier.weight", "classifier.bias"},
    "SegformerForSemanticSegmentation": {
        *("decode_head.classifier.weight", "decode_head.classifier.bias"),
    },
    "CLIPModel": {"visual_projection.weight", "text_projection.weight"},
    "CLIPForImageClassification": {"classifier.weight", "classifier.bias"},
}


def make(name: str) -> Any:
    kind = next(k for k in CONFIGS if name.startswith(k) and not name[len(k)].islower())
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind])
    return getattr(transformers, name)(config)


def named(groups: list[dict[str, Any]], option: str, value: Any) -> set[str]:
    return {n for g in groups if g.get(option) == value for n in g["param_names"]}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    assert named(param_groups(make(name)), "clipping", 0.0) == HEADS[name]


@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "ViTModel", "SegformerModel"])
def test_models_without_a_head_say_what_to_pass(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} shows no head.*exclude_head=False"):
        param_groups(make(name))
    assert named(param_groups(make(name), exclude_head=False), "clipping", 0.0) == set()


def test_the_same_groups_when_compiled() -> None:
    model = make("BertForSequenceClassification")
    names = [g["param_names"] for g in param_groups(model, weight_decay=0.1)]
    compiled: Any = torch.compile(model)
    groups = param_groups(compiled, weight_decay=0.1)
    assert [g["param_names"] for g in groups] == names


def test_gpt2s_conv1d_has_its_units_in_dimension_1() -> None:
    model = make("GPT2LMHeadModel")
    stored_in_out = {
        f"{name}.weight" for name, m in model.named_modules() if type(m).__name__ == "Conv1D"
    }
    assert len(stored_in_out) == 8
    assert named(param_groups(model), "unit_dim", 1) == stored_in_out


def test_units_of_experts_stored_in_out() -> None:
    config = transformers.GptOssConfig(
        **SIZES, head_dim=8, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
    )
    model = transformers.GptOssForCausalLM(config)
    groups = param_groups(model, units={"*.experts.*_proj": (0, 2)})
    experts = {n for n, p in model.named_parameters() if p.shape == (3, 16, p.shape[-1])}
    assert len(experts) == 4
    assert named(groups, "unit_dim", (0, 2)) == experts
    optimizer = AdamW_AGC(groups, lr=1e-2)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()


class OurTrainer(transformers.Trainer):  # type: ignore[misc]  # installed for these tests only
    def create_optimizer(self, model: Any = None) -> Any:
        given = super().create_optimizer(model).param_groups
        self.given = [dict(group) for group in given]
        groups = param_groups(self.model, groups=given)
        self.optimizer = AdamW_AGC(groups, lr=self.args.learning_rate, clipping=0.1)
        return self.optimizer


def test_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make("BertForSequenceClassification")
    rows = [{"input_ids": torch.randint(32, (6,)), "labels": i % 3} for i in range(6)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=6,
        logging_steps=1,
        save_steps=4,
        report_to=[],
    )
    trainer = OurTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    groups = trainer.optimizer.param_groups
    assert named(groups, "clipping", 0.0) == {"classifier.weight", "classifier.bias"}
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for g in trainer.given if g["weight_decay"] for p in g["params"]}
    resumed = OurTrainer(make("BertForSequenceClassification"), arguments, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for ours, theirs in zip(model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours)


def test_a_step_of_every_model_that_has_a_head() -> None:
    for name in HEADS:
        model = make(name)
        optimizer = AdamW_AGC(param_groups(model), lr=1e-2)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = [not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)]
        assert isinstance(model, nn.Module)
        assert all(moved)
