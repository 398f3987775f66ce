r"""Trains a normalizer-free network at large batch with AGC: copy it and begin.

    python -m examples.train --data images=/data/imagenet --model dm_nfnet_f0 \
        --batch 4096 --accumulate 16 --amp bf16 --compile --workers 12
    torchrun --nproc-per-node 8 -m examples.train ...

Without arguments it trains the project's own small network on synthetic images. ``--batch`` is of
one step, over all ranks and parts. Into ``--out`` come epochs.csv, a row per epoch, clipping-1.csv
and so on, what the clip did to each parameter, checkpoint.pt and, where tensorboard is installed,
its events. Run it again after it was cut, in the middle of an epoch too, and it goes on: to the
same bits on a CPU, and on GPUs as far as their kernels give the same bits twice
(torch.use_deterministic_algorithms).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import agc_triton.optim
from agc_triton import param_groups
from benchmarks.lib import networks
from benchmarks.lib.arguments import named_folder, positive
from benchmarks.lib.compare.augment import crop_and_flip
from benchmarks.lib.data import catalog
from benchmarks.lib.data.sets import Images
from benchmarks.lib.learning import warmup_and_cosine

AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = [name for name in agc_triton.optim.__all__ if name.endswith("_AGC")]
OPTIONS: dict[str, dict[str, Any]] = {"SGD_AGC": {"momentum": 0.9, "nesterov": True}}
STATEFUL = ("net", "ema", "optimizer", "scheduler", "scaler")
# What a run may go on with otherwise, as the numbers do not depend on it.
FREE = ("compile", "data", "out", "workers")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    data = f"{', '.join(catalog.NAMES)}; as NAME=FOLDER: docs/comparison.md"
    parser.add_argument("--data", type=named_folder, default="synthetic", help=data)
    parser.add_argument("--images", type=int, default=0, help="to train on; default: all")
    parser.add_argument("--pixels", type=int, default=0, help="default: their own, 224 of files")
    parser.add_argument("--model", default=networks.OWN, help="the project's, or timm's")
    parser.add_argument("--optimizer", choices=OURS, default="SGD_AGC")
    parser.add_argument("--lr", type=float, default=0.1, help="at batch 256, times batch / 256")
    parser.add_argument("--clipping", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=2e-5)
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--accumulate", type=positive, default=1, help="parts of a rank's batch")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--warmup", type=float, default=1.0, help="in epochs")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the weights' average")
    parser.add_argument("--amp", choices=AMP, default="off")
    parser.add_argument("--compile", action="store_true", help="the model, by torch.compile")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=positive, default=100, help="steps to log and save after")
    parser.add_argument("--out", type=Path, default=Path("out/train"))
    args = parser.parse_args(argv)
    if not networks.is_known(args.model):
        parser.error(f"argument --model: {args.model} is no model of timm's, if there is timm")
    return args


class Order(Sampler[Tensor]):
    """Indices of an epoch's batches from ``step`` on, this rank's, part by part."""

    def __init__(self, images: int, args: argparse.Namespace, rank: int, world: int) -> None:
        if args.batch % (world * args.accumulate) or args.batch > images:
            raise ValueError(
                f"--batch {args.batch} has to be a multiple of {world} ranks times --accumulate"
                f" {args.accumulate}, and at most {images:,}, the images to train on"
            )
        self.images, self.args, self.rank, self.world = images, args, rank, world
        self.epoch = self.step = 0
        self.steps = images // args.batch

    def __iter__(self) -> Iterator[Tensor]:
        """The epoch's number is the seed; what is no whole batch at the end is left out."""
        rng = torch.Generator().manual_seed(self.args.seed + self.epoch)
        order = torch.randperm(self.images, generator=rng)
        for batch in torch.split(order, self.args.batch)[self.step : self.steps]:
            yield from batch[self.rank :: self.world].chunk(self.args.accumulate)


class Training:
    """All that a run depends on, and how far it is."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device, ddp = args, device, dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if ddp else (0, 1)
        self.settings = {key: value for key, value in vars(args).items() if key not in FREE}
        name, folder = args.data
        self.settings |= {"data": name, "ranks": self.world}
        data = catalog.load(name, folder, args.images, args.pixels, torch.device("cpu"))
        self.data = data._replace(mean=data.mean.to(device), std=data.std.to(device))
        self.order = Order(len(data.train), args, self.rank, self.world)
        self.loader = self._loader(data.train, self.order)
        tests = torch.arange(len(data.test))[self.rank :: self.world]
        self.tests = self._loader(data.test, torch.split(tests, 256))

        torch.manual_seed(args.seed)  # the same weights on every rank
        pixels = data.train.pick(torch.zeros(1, dtype=torch.int64))[0].shape[-1]
        net = networks.classifier(args.model, pixels, data.classes, data.channels)
        self.net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
        groups = param_groups(self.net, clipping=args.clipping, weight_decay=args.weight_decay)
        make, options = getattr(agc_triton.optim, args.optimizer), OPTIONS.get(args.optimizer, {})
        self.optimizer = make(groups, lr=args.lr * args.batch / 256, **options)
        warmup, steps = max(1, round(args.warmup * self.order.steps)), self.order.steps
        self.scheduler = warmup_and_cosine(self.optimizer, args.epochs * steps, warmup)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        average = get_ema_multi_avg_fn(args.ema)  # type: ignore[no-untyped-call]  # torch's
        self.ema = AveragedModel(self.net, multi_avg_fn=average, use_buffers=True)
        if args.compile:
            self.net.compile()
        self.model: nn.Module = DistributedDataParallel(self.net) if ddp else self.net

        torch.manual_seed(args.seed + 1 + self.rank)
        self.rows: list[dict[str, Any]] = []
        # Of the epoch: steps made, seconds taken; losses, right answers and images of this rank.
        self.step, self.seconds, self.sums = 0, 0.0, torch.zeros(3, device=device)
        self.load()
        self.board: Any = None
        if self.rank == 0 and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out, purge_step=self.scheduler.last_epoch)

    def _loader(self, images: Images, order: Any) -> DataLoader[Any]:
        """Whole batches; its generator leaves alone the random numbers that a checkpoint has."""
        return DataLoader(
            torch.arange(len(images)),  # type: ignore[arg-type]  # indices of indices are indices
            batch_size=None,
            sampler=order,
            collate_fn=images.pick,  # type: ignore[arg-type]  # as batch_size is None
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )

    def epoch(self) -> None:
        """Go on to the end of the epoch, test the average, and write a row."""
        self.order.epoch, self.order.step = len(self.rows), self.step
        self.optimizer.track_clipping(self.args.every)  # steps are counted from here
        self.model.train()
        parts, start = iter(self.loader), time.perf_counter() - self.seconds
        label, hidden = f"epoch {len(self.rows) + 1}/{self.args.epochs}", self.rank > 0 or None
        with tqdm(total=self.order.steps, initial=self.step, desc=label, disable=hidden) as bar:
            while self.step < self.order.steps:
                self.update(parts)
                if self.step % self.args.every == 0:
                    self.log(bar)
                self.step += 1
                self.seconds = time.perf_counter() - start
                bar.update()
                if self.step % self.args.every == 0 and self.step < self.order.steps:
                    self.save()
        row = {"epoch": len(self.rows) + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        row["loss"], row["accuracy"] = self.means(self.sums)
        row["ema_test_loss"], row["ema_test_accuracy"] = self.test()
        row |= self.optimizer.clip_log()  # of the last step that was logged
        row["seconds"] = self.seconds
        row["images_per_s"] = self.order.steps * self.args.batch / self.seconds
        self.rows.append(row)
        if self.rank == 0:
            self.optimizer.clip_stats().to_csv(self.args.out / f"clipping-{row['epoch']}.csv")
        self.step, self.seconds, self.sums = 0, 0.0, torch.zeros_like(self.sums)
        self.save()

    def update(self, parts: Iterator[Any]) -> None:
        """One step, on gradients of all parts of the batch."""
        for left in reversed(range(self.args.accumulate)):
            images, labels = next(parts)
            images = crop_and_flip(images.to(self.device, non_blocking=True), self.data.flip)
            # Ranks wait for each other at the last part only.
            alone = left and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if alone else nullcontext():  # type: ignore[operator]  # DDP's
                loss, found = self.loss(self.model, images, labels)
                self.scaler.scale(loss / self.args.accumulate).backward()
            self.sums += found
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.ema.update_parameters(self.net)

    def log(self, bar: Any) -> None:
        """What the run is like, with one wait for the device."""
        loss = float(self.sums[0] / self.sums[2])
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        numbers = {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"]}
        numbers |= self.optimizer.clip_log()
        for name, number in numbers.items() if self.board else ():
            self.board.add_scalar(name, number, self.scheduler.last_epoch)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss; and that of all images, how many are right, and how many there are."""
        x = self.data.standardized(images).contiguous(memory_format=torch.channels_last)
        labels, dtype = labels.to(self.device, non_blocking=True), AMP[self.args.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(x).float()
        loss, count = F.cross_entropy(logits, labels), len(labels)
        right = (logits.argmax(1) == labels).sum()
        return loss, torch.stack([loss.detach() * count, right, loss.new_tensor(count)])

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Loss and accuracy of the average on images that are not trained on."""
        self.ema.eval()
        sums = torch.zeros_like(self.sums)
        for images, labels in self.tests:
            sums += self.loss(self.ema, images.to(self.device), labels)[1]
        return self.means(sums)

    def means(self, sums: Tensor) -> tuple[float, float]:
        """Loss and accuracy over all ranks."""
        if self.world > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        loss, right = (sums[:2] / sums[2]).tolist()
        return loss, right

    def save(self) -> None:
        """Write the table, and a checkpoint in one piece or not at all."""
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.device))
        ranks: list[Any] = [{"random": random, "sums": self.sums.cpu(), "seconds": self.seconds}]
        if self.world > 1:
            ranks *= self.world
            dist.all_gather_object(ranks, ranks[0])
        if self.rank == 0:
            pd.DataFrame(self.rows).to_csv(self.args.out / "epochs.csv", index=False)
            far = {"settings": self.settings, "rows": self.rows, "step": self.step, "ranks": ranks}
            states = {name: getattr(self, name).state_dict() for name in STATEFUL}
            torch.save({**far, **states}, self.args.out / "checkpoint.new")
            os.replace(self.args.out / "checkpoint.new", self.args.out / "checkpoint.pt")

    def load(self) -> None:
        """Go on from a checkpoint, if there is one; a ValueError if it is of other settings."""
        file = self.args.out / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved = state["settings"]
        if other := [f"{k}={saved.get(k)}" for k, v in self.settings.items() if saved.get(k) != v]:
            raise ValueError(f"{file} is of a run with {', '.join(other)}: give another --out")
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.rows, self.step, own = state["rows"], state["step"], state["ranks"][self.rank]
        self.sums, self.seconds = own["sums"].to(self.device), own["seconds"]
        torch.set_rng_state(own["random"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["random"][1], self.device)


def train(args: argparse.Namespace, device: torch.device) -> Training:
    """Train to the end, from wherever an earlier run was cut."""
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args, device)
    while len(training.rows) < args.epochs:
        training.epoch()
        if training.rank == 0:
            print(", ".join(f"{k} {v:.4g}" for k, v in training.rows[-1].items()), flush=True)
    return training


def main() -> None:
    """The only process, or one of those that torchrun starts."""
    args, device = arguments(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
