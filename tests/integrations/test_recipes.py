"""The recipes of docs/integrations.md for other packages run and train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import timm
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.loggers import CSVLogger
from timm.optim import Lookahead
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agc_triton import SGD_AGC, AdamW_AGC
from tests.support.bases import SAM
from tests.support.recipes import batches_of, loss_of, network, run_recipe, sections

TRAINERS = ("Lightning", "transformers", "Accelerate")
OTHERS = {"timm", "timm's factory", *TRAINERS}
LOGS = {f"The clip's log {how}" for how in ("in a loop", *(f"with {name}" for name in TRAINERS))}
PLAIN = {"Averages of weights: EMA and SWA", "LR finder", "SAM", "Lookahead"}
PLAIN |= {"Muon and Adafactor", "LBFGS", "Sparse embeddings", "Optimizer in backward"}
BATCHES = batches_of(8)


def vit() -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, **options)


def unclipped(optimizer: Any, model: nn.Module) -> set[str]:
    groups = optimizer.param_groups
    found = {id(p) for group in groups if not group["clipping"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in found}


def test_every_recipe_has_a_test() -> None:
    assert set(sections()) == OTHERS | LOGS | PLAIN


def test_timm() -> None:
    model = network()
    before = loss_of(model, BATCHES)
    names = run_recipe("timm", model=model, batches=BATCHES)
    assert loss_of(model, BATCHES) < before
    assert unclipped(names["optimizer"], model) == {"3.weight", "3.bias"}


def test_timms_factory() -> None:
    model = vit()
    names = run_recipe("timm's factory", model=model)
    optimizer, around = names["optimizer"], names["with_lookahead"]
    assert isinstance(optimizer, AdamW_AGC)
    assert unclipped(optimizer, model) == {"head.weight", "head.bias"}
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2
    assert isinstance(around, Lookahead)
    inner = around._base_optimizer
    assert isinstance(inner, SGD_AGC)
    assert unclipped(inner, model) == set()
    assert {(g["momentum"], g["nesterov"], g["clipping"]) for g in inner.param_groups} == {
        (0.9, True, 0.01)
    }
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    for each in (optimizer, around):
        loss: Any = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        each.step()
        each.zero_grad()


def test_lightning(tmp_path: Path) -> None:
    inputs, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    model = network()
    before = loss_of(model, BATCHES)
    names = run_recipe("Lightning", model=model, batches=loader, trainer_options=options)
    assert loss_of(model, BATCHES) < before
    trained = names["trainer"].optimizers[0]
    assert unclipped(trained, model) == {"3.weight", "3.bias"}
    assert trained.param_groups[-1]["lr"] == 1e-4
    assert not _optimizer_handles_unscaling(names["optimizer"])
    # Resumed from its checkpoint it goes on where it ended.
    names["trainer"].save_checkpoint(tmp_path / "last.ckpt")
    weights = [p.detach().clone() for p in model.parameters()]
    again = names["Module"]()
    resumed = lightning.Trainer(max_epochs=2, callbacks=[names["Unfreeze"]()], **options)
    resumed.fit(again, loader, ckpt_path=tmp_path / "last.ckpt")
    for ours, theirs in zip(weights, again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=32,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def trainer_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
    }


ROWS = [{"input_ids": torch.full((6,), i), "labels": i % 3} for i in range(6)]


def test_transformers(tmp_path: Path) -> None:
    options, model = trainer_options(tmp_path), bert()
    names = run_recipe("transformers", model=model, rows=ROWS, training_options=options)
    head = {"classifier.weight", "classifier.bias"}
    assert unclipped(names["trainer"].optimizer, model) == head
    assert names["arguments"].max_grad_norm == 0.0


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_trainers_own_arguments_clip_the_head_too(tmp_path: Path, max_grad_norm: float) -> None:
    model, options = bert(), trainer_options(tmp_path)
    arguments = transformers.TrainingArguments(**options, max_grad_norm=max_grad_norm)
    given = (AdamW_AGC, {"clipping": 0.02, "lr": 1e-2})
    trainer = transformers.Trainer(
        model, arguments, train_dataset=ROWS, optimizer_cls_and_kwargs=given
    )
    trainer.train()
    assert unclipped(trainer.optimizer, model) == set()


def test_accelerate() -> None:
    assert accelerate.__version__
    model = network()
    before = loss_of(model, BATCHES)
    names = run_recipe("Accelerate", model=model, batches=BATCHES)
    assert loss_of(names["model"], BATCHES) < before
    assert unclipped(names["optimizer"], model) == {"3.weight", "3.bias"}


def test_the_clips_log_with_lightning(tmp_path: Path) -> None:
    inputs, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    logger = CSVLogger(tmp_path)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": logger,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    heading = "The clip's log with Lightning"
    run_recipe(heading, model=network(), batches=loader, trainer_options=options)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert "agc/clipped" in rows[0]
    assert len(rows) == 1 + len(BATCHES) // 4


def test_the_clips_log_with_transformers(tmp_path: Path) -> None:
    options = {**trainer_options(tmp_path), "logging_steps": 2}
    heading = "The clip's log with transformers"
    names = run_recipe(heading, model=bert(), rows=ROWS, training_options=options)
    history = names["trainer"].state.log_history
    assert [row["step"] for row in history if "agc/clipped" in row] == [2, 4, 6]


class Tracker(GeneralTracker):  # type: ignore[misc]  # installed for these tests only
    """Keeps what Accelerate logs."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    @property
    def tracker(self) -> Any:
        return self.logged

    def store_init_configuration(self, values: Any) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.logged.append(values)


def test_the_clips_log_with_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    GradientState._reset_state()
    tracker = Tracker()
    options = {"cpu": True, "log_with": tracker}
    heading = "The clip's log with Accelerate"
    run_recipe(heading, model=network(), batches=BATCHES, accelerator_options=options)
    assert len(tracker.logged) == len(BATCHES) // 2 // 2
    assert all(0 <= numbers["agc/clipped"] <= 1 for numbers in tracker.logged)


def test_lookahead_and_sam_with_timms_lookahead() -> None:
    model = network()
    before = loss_of(model, BATCHES)
    run_recipe("Lookahead", model=model, batches=BATCHES, Lookahead=Lookahead)
    run_recipe("SAM", model=model, batches=BATCHES, SAM=SAM)
    assert loss_of(model, BATCHES) < before
