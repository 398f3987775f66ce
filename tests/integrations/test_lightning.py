"""Lightning: its trainer, BaseFinetuning, and checkpoints of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from agc_triton import AGC, SGD_AGC, AdamW_AGC, param_groups

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "SGD_AGC": lambda groups: SGD_AGC(groups, lr=0.1, momentum=0.9, clipping=0.1),
    "AdamW_AGC": lambda groups: AdamW_AGC(groups, lr=0.01, clipping=0.1),
    "AGC": lambda groups: AGC(SGD(groups, lr=0.1, momentum=0.9), clipping=0.1),
}


class Module(lightning.LightningModule):  # type: ignore[misc]  # installed for these tests only
    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)
        self.make = make

    def training_step(self, batch: Any, _index: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.head(self.backbone(inputs)), labels)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:  # a checkpoint does not say what is frozen
            self.backbone.requires_grad_(True)

    def configure_optimizers(self) -> Optimizer:
        return self.make(param_groups(self, weight_decay=0.01))


class Unfreeze(BaseFinetuning):  # type: ignore[misc]  # as above
    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.backbone)

    def finetune_function(self, module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=0.05)


def fit(make: Any, folder: Path, epochs: int, resume: Path | None = None) -> Any:
    torch.manual_seed(0)
    module = Module(make)
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.arange(16) % 2), batch_size=8)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[Unfreeze()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module, trainer.optimizers[0]


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_unfrozen_layers_are_added_and_trained(make: Any, tmp_path: Path) -> None:
    module, optimizer = fit(make, tmp_path, epochs=3)
    added = optimizer.param_groups[-1]
    assert [id(p) for p in added["params"]] == [id(p) for p in module.backbone[0].parameters()]
    assert (added["lr"], added["clipping"], len(added["param_names"])) == (0.05, 0.1, 2)
    head = [g for g in optimizer.param_groups if g["clipping"] == 0]
    assert {name for g in head for name in g["param_names"]} == {"head.weight", "head.bias"}
    torch.manual_seed(0)
    before: Any = Module(make).backbone
    assert not torch.equal(module.backbone[0].weight, before[0].weight)
    fit(make, tmp_path, epochs=2)
    resumed, _ = fit(make, tmp_path, epochs=3, resume=tmp_path / "2.ckpt")
    for ours, theirs in zip(module.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours)


def test_the_head_of_the_model_that_a_module_holds() -> None:
    class Holding(lightning.LightningModule):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.create_model("resnet18", pretrained=False, num_classes=3)
            self.loss = nn.CrossEntropyLoss()

    groups = param_groups(Holding())
    unclipped = {n for g in groups if g.get("clipping") == 0 for n in g["param_names"]}
    assert unclipped == {"model.fc.weight", "model.fc.bias"}
