"""What Lightning's, transformers' and Accelerate's own logging is given by the callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from agc_triton import AGC, SGD_AGC, AdamW_AGC, param_groups
from agc_triton.integrations import ClipMonitor, LightningClipMonitor, TransformersClipCallback
from agc_triton.integrations.monitor import clipping_optimizer
from tests.integrations.test_recipes import ROWS, bert, trainer_options
from tests.support.recipes import batches_of, network

NUMBERS = {"agc/clipped", "agc/ratio_50", "agc/ratio_95", "agc/ratio_max", "agc/removed"}
MAKE: dict[str, Any] = {
    "SGD_AGC": lambda params: SGD_AGC(params, lr=0.1, clipping=0.05),
    "AGC": lambda params: AGC(SGD(params, lr=0.1), clipping=0.05),
}
BATCHES = batches_of(12)


class Module(lightning.LightningModule):  # type: ignore[misc]  # installed for these tests only
    """Keeps what each step's clip was, as the optimizer tells it."""

    def __init__(self, make: Any, several: bool = False) -> None:
        super().__init__()
        self.model, self.make, self.several = network(), make, several
        self.automatic_optimization = not several
        self.told: list[dict[str, float]] = []

    def training_step(self, batch: Any, _index: int) -> Tensor | None:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        if not self.several:
            return loss
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return None

    def on_before_zero_grad(self, optimizer: Any) -> None:
        found: Any = clipping_optimizer(optimizer)
        if found._recorder.ever:
            self.told.append(found.clip_log())

    def configure_optimizers(self) -> Any:
        if self.several:
            return [self.make(self.model[:2].parameters()), self.make(self.model[3].parameters())]
        return self.make(param_groups(self.model))


def fit(module: Module, folder: Path, callback: Any, **options: Any) -> list[Any]:
    """The rows that the CSV logger wrote with numbers of the clip."""
    import pandas as pd

    inputs, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    logger = CSVLogger(folder, flush_logs_every_n_steps=1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
        logger=logger,
        callbacks=[callback],
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, labels), batch_size=8))
    rows: Any = pd.read_csv(Path(logger.log_dir) / "metrics.csv").to_dict("records")
    return list(rows)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_lightning_logs_at_its_own_steps(make: Any, tmp_path: Path) -> None:
    module = Module(make)
    rows = fit(module, tmp_path, LightningClipMonitor(), log_every_n_steps=4)
    assert [row["step"] for row in rows] == [3, 7, 11]
    assert set(rows[0]) >= NUMBERS
    for row in rows[:2]:  # gradients are put away before the next step
        after = module.told[row["step"] + 1]
        assert {key: row[key] for key in NUMBERS} == {
            f"agc/{key}": pytest.approx(value) for key, value in after.items()
        }


def test_lightning_logs_accumulated_steps_once(tmp_path: Path) -> None:
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": 3}
    rows = fit(Module(MAKE["SGD_AGC"]), tmp_path, LightningClipMonitor(every=2), **options)
    assert [row["step"] for row in rows if row["agc/clipped"] >= 0] == [1, 3]


def test_several_optimizers_are_told_apart(tmp_path: Path) -> None:
    module = Module(MAKE["SGD_AGC"], several=True)
    rows = fit(module, tmp_path, LightningClipMonitor(), log_every_n_steps=12)
    names = {key for key in rows[0] if key.startswith("agc/")}
    assert names == {f"agc/{i}/{key[4:]}" for i in (0, 1) for key in NUMBERS}


def test_tracking_ends_with_lightnings_training(tmp_path: Path) -> None:
    module = Module(MAKE["SGD_AGC"])
    fit(module, tmp_path, LightningClipMonitor(), log_every_n_steps=6)
    assert module.told
    optimizer: Any = clipping_optimizer(module.trainer.optimizers[0])
    assert optimizer._recorder.every == 0


def test_lightning_without_an_optimizer_that_clips(tmp_path: Path) -> None:
    module = Module(lambda params: SGD(params, lr=0.1))
    with pytest.raises(TypeError, match=r"Module's optimizers \(SGD\) do not clip"):
        fit(module, tmp_path, LightningClipMonitor())


def train(folder: Path, make: Any, every: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A Trainer after its training, and what reached its reporting callbacks."""
    given = {**trainer_options(folder), "logging_steps": 2, "max_grad_norm": 0.0, **options}
    reported: list[Any] = []

    class Reporter(transformers.TrainerCallback):  # type: ignore[misc]  # as above
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            reported.append((state.global_step, set(logs)))

    model = bert()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**given),
        train_dataset=ROWS,
        callbacks=[Reporter()],
        optimizers=(make(model.parameters()), None),
    )
    trainer.add_callback(TransformersClipCallback(trainer, every))
    trainer.train()
    return trainer, reported


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_trainer_logs_at_its_own_steps(make: Any, tmp_path: Path) -> None:
    trainer, reported = train(tmp_path, make)
    history = [row for row in trainer.state.log_history if "agc/clipped" in row]
    assert [row["step"] for row in history] == [2, 4, 6]
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == [2, 4, 6]
    assert all(set(row) == NUMBERS | {"epoch", "step"} for row in history)
    assert [step for step, keys in reported if keys >= NUMBERS] == [2, 4, 6]
    optimizer: Any = clipping_optimizer(trainer.optimizer)
    last = {f"agc/{key}": value for key, value in optimizer.clip_log().items()}
    assert {key: history[-1][key] for key in NUMBERS} == last
    assert optimizer._recorder.every == 0


def test_the_trainer_logs_the_latest_step_that_was_tracked(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, MAKE["SGD_AGC"], every=4)
    rows = [row for row in trainer.state.log_history if "agc/clipped" in row]
    first, second, third = ({key: row[key] for key in NUMBERS} for row in rows)
    for key in NUMBERS - {"agc/removed"}:  # which goes by the weights as they are now
        assert first[key] == second[key]  # of step 1
    assert second != third  # of step 5


def test_a_trainer_without_an_optimizer_that_clips(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"the Trainer's optimizers \(.*\) do not clip"):
        train(tmp_path, lambda params: SGD(params, lr=0.1))


def test_accumulated_steps_are_logged_once_with_accelerate() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    given: Optimizer = AdamW_AGC(network().parameters(), lr=1e-2, clipping=0.05)
    model, optimizer = accelerator.prepare(network(), given)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    logged: list[dict[str, float]] = []
    ClipMonitor(optimizer, logged.append, every=2)
    for inputs, labels in BATCHES:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
    assert len(logged) == len(BATCHES) // 2 // 2
    assert all(set(row) == NUMBERS for row in logged)
