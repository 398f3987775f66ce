"""One run, epoch by epoch, which goes on where it was cut."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lib.compare.augment import crop_and_flip
from benchmarks.lib.compare.grid import Run
from benchmarks.lib.data.catalog import load
from benchmarks.lib.data.sets import Dataset, chunks
from benchmarks.lib.learning import is_broken, warmup_and_cosine
from benchmarks.lib.machine import device_name, timestamp
from benchmarks.lib.networks import classifier
from benchmarks.lib.optimizers import backend, for_training
from benchmarks.lib.versions import our_version, triton_version

# Larger batches go through the network in chunks whose gradients add up, so that memory is bounded.
CHUNK = 1024
MEASURED = [
    *("epoch", "train_loss", "test_loss", "train_accuracy", "test_accuracy"),
    *("seconds", "images_per_s", "share_of_units_clipped", "diverged"),
    *("backend", "parameters", "device", "threads", "version", "torch", "triton", "timestamp"),
]
COLUMNS = [*Run._fields, *MEASURED]
Row = dict[str, Any]


class Where(NamedTuple):
    """On which device runs are made, where data lie by name, and where runs are kept."""

    device: str
    folders: dict[str, Path]
    unfinished: Path
    threads: int


@functools.lru_cache(maxsize=1)
def _data(name: str, folder: Path | None, images: int, pixels: int, device: str) -> Dataset:
    return load(name, folder, images, pixels, torch.device(device))


def data_of(run: Run, where: Where) -> Dataset:
    """The latest data are kept."""
    return _data(run.data, where.folders.get(run.data), run.images, run.pixels, where.device)


def kept_in(run: Run, where: Where) -> Path:
    """The file of a run that has begun."""
    return where.unfinished / f"{hashlib.sha256(repr(run).encode()).hexdigest()[:16]}.pt"


def forget(run: Run, where: Where) -> None:
    """Remove its file, and those that a kill kept from becoming it."""
    for file in where.unfinished.glob(f"{kept_in(run, where).stem}.*"):
        file.unlink(missing_ok=True)


def is_over(row: Row) -> bool:
    """Whether it is its run's last: of the last epoch, or of one whose loss is not finite."""
    finite = math.isfinite(row["train_loss"] + row["test_loss"])
    return row["epoch"] == row["epochs"] or not finite


def train(run: Run, written: int, where: Where) -> Iterator[Row]:
    """Rows of the epochs after those that have been written.

    A run is kept before its row is given away, so that no row is lost, whenever the process ends.
    """
    file = kept_in(run, where)
    training = Training(run, data_of(run, where), torch.device(where.device))
    if file.exists():
        training.load(file)
    while not (training.rows and is_over(training.rows[-1])):
        # Of rows that are known already, and of those that an interrupt kept from being written.
        yield from training.rows[written:]
        written = max(written, len(training.rows))
        training.rows.append(training.epoch())
        training.save(file)
    yield from training.rows[written:]


class Training:
    """A network with all that its next epoch depends on."""

    def __init__(self, run: Run, data: Dataset, on: torch.device) -> None:
        self.run, self.data, self.on = run, data, on
        self.rows: list[Row] = []
        self.clipped, self.aside = math.nan, 0.0
        torch.manual_seed(run.seed)
        pixels = data.train.pick(torch.zeros(1, dtype=torch.int64))[0].shape[-1]
        net = classifier(run.model, pixels, data.classes, data.channels)
        self.net = net.to(on, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
        self.optimizer = for_training(run.optimizer, self.net, run.lr, run.clipping)
        # The last batch of an epoch is left out where it is not whole.
        self.steps = len(data.train) // run.batch
        self.scheduler = warmup_and_cosine(self.optimizer, run.epochs * self.steps, self.steps)
        self.tracked = False

    def epoch(self) -> Row:
        """Train once over the images, then test."""
        start = self._now()
        loss, accuracy = self._pass_over_training()
        seconds = self._now() - start - self.aside
        test_loss, test_accuracy = self._test()
        found = (
            *(len(self.rows) + 1, loss, test_loss, accuracy, test_accuracy),
            *(seconds, self.steps * self.run.batch / seconds, self.clipped),
            is_broken(loss + test_loss, test_accuracy, self.data.classes),
            *(backend(self.optimizer), sum(p.numel() for p in self.net.parameters())),
            *(device_name(self.on), torch.get_num_threads()),
            *(our_version(), str(torch.__version__), triton_version(), timestamp()),
        )
        return {**self.run._asdict(), **dict(zip(MEASURED, found, strict=True))}

    def _pass_over_training(self) -> tuple[float, float]:
        """Mean loss and accuracy of the batches, each before its step."""
        self.net.train()
        total, right = torch.zeros(2, device=self.on)
        order = torch.randperm(len(self.data.train))
        for step in range(self.steps):
            self.optimizer.zero_grad()
            batch = order[step * self.run.batch : (step + 1) * self.run.batch]
            for part in chunks(batch, CHUNK):
                images, labels = self.data.train.pick(part)
                loss, logits = self._loss(crop_and_flip(images, self.data.flip), labels)
                (loss / len(batch)).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
                total += loss.detach()
                right += (logits.argmax(1) == labels).sum()
            if step == self.steps - 1 and self.run.clipping and not self.tracked:
                self._agc.track_clipping(self.steps, warn=False)  # in later epochs the last too
                self.tracked = True
            self.optimizer.step()
            self.scheduler.step()
        self._look_at_clipping()
        count = self.steps * self.run.batch
        return total.item() / count, right.item() / count

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Loss and accuracy on the images that are not trained on, as they are."""
        self.net.eval()
        total, right = torch.zeros(2, device=self.on)
        count = len(self.data.test)
        for part in chunks(torch.arange(count), CHUNK):
            images, labels = self.data.test.pick(part)
            loss, logits = self._loss(images, labels)
            total += loss
            right += (logits.argmax(1) == labels).sum()
        return total.item() / count, right.item() / count

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the images' losses, and logits."""
        dtype = getattr(torch, self.run.dtype)
        x = self.data.standardized(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.on.type, dtype, enabled=dtype != torch.float32):
            logits = self.net(x)
        return F.cross_entropy(logits.float(), labels, reduction="sum"), logits

    def _look_at_clipping(self) -> None:
        """The share of units that the last step has clipped, and what it took to look."""
        if self.run.clipping:
            start = self._now()
            self.clipped = self._agc.clip_log()["clipped"]
            self.aside = self._now() - start

    @property
    def _agc(self) -> Any:
        """The optimizer, where it clips."""
        return self.optimizer

    def _now(self) -> float:
        """Seconds, when a GPU has done what it was given."""
        if self.on.type == "cuda":
            torch.cuda.synchronize(self.on)
        return time.perf_counter()

    def save(self, file: Path) -> None:
        """In one piece, or not at all."""
        random_states = [torch.get_rng_state()]
        if self.on.type == "cuda":
            random_states.append(torch.cuda.get_rng_state(self.on))
        state = {
            "rows": self.rows,
            "random_states": random_states,
            **{name: part.state_dict() for name, part in self._parts().items()},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        torch.save(state, unfinished)
        os.replace(unfinished, file)

    def load(self, file: Path) -> None:
        """What `save` wrote, by the same run on the same kind of device."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.rows = state["rows"]
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random_states"][0])
        if self.on.type == "cuda":
            torch.cuda.set_rng_state(state["random_states"][1], self.on)

    def _parts(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}
