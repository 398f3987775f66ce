"""Trains the demo's normalizer-free network on several ranks, sharded as you like.

    torchrun --nproc-per-node 2 -m examples.train_sharded --parallel fsdp2 --checkpoint out/sharded

Run it again with more --epochs and it goes on from the checkpoint, on any number of ranks and
sharded otherwise if you like. Ranks are on GPUs (NCCL) where there are some, else on the CPU
(gloo).
Needs scikit-learn, for its digits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from agc_triton import SGD_AGC, param_groups
from benchmarks.lib.nfnet import NFNet

PARALLEL = ("ddp", "fsdp2", "hsdp", "tp")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES, BATCH = 10, 256


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", choices=PARALLEL, default="fsdp2")
    parser.add_argument("--amp", choices=AMP, default="off")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.8)
    parser.add_argument("--clipping", type=float, default=0.04)
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from and to save to")
    args = parser.parse_args(argv)
    if args.parallel == "tp" and args.amp == "fp16":  # only the head's parameters are DTensors
        parser.error("torch's GradScaler refuses plain gradients beside DTensors': use --amp bf16")
    return args


def one_element(net: nn.Module) -> None:
    """NFNets have 0-dim skip gains, which fully_shard refuses; of shape (1,) they do the same."""
    for param in net.parameters():
        if param.dim() == 0:
            param.data = param.data.reshape(1)


def parallelized(net: nn.Module, how: str, mesh: DeviceMesh) -> nn.Module:
    """The network on this rank; groups are made before this or after it, which is all the same."""
    if how == "ddp":
        return DistributedDataParallel(net)
    if how == "tp":  # the batch is on all ranks then, and of the head each has some classes
        plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate())}
        return parallelize_module(net, mesh["shard"], plan)
    for block in net.blocks:  # type: ignore[union-attr]  # a Sequential
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def mesh_for(how: str, device: str) -> DeviceMesh:
    """All ranks in one dimension, or two replicas of what the others share."""
    world = dist.get_world_size()
    if how == "hsdp":
        replicas = 2 if world % 2 == 0 else 1
        shape, names = (replicas, world // replicas), ("replicate", "shard")
        return init_device_mesh(device, shape, mesh_dim_names=names)
    return init_device_mesh(device, (world,), mesh_dim_names=("shard",))


class Checkpoint:
    """Weights and optimizer after each epoch, in folders of torch.distributed.checkpoint."""

    def __init__(self, folder: Path | None, net: nn.Module, optimizer: Any) -> None:
        self.folder, self.net, self.optimizer = folder, net, optimizer

    def load(self) -> int:
        """Go on from the latest; epochs made.

        What a checkpoint of torch.optim lacks, AGC's options, stays as it is.
        """
        folders = sorted(self.folder.glob("*/.metadata")) if self.folder else []
        if not folders:
            return 0
        folder = folders[-1].parent
        state = self._state()
        planner = DefaultLoadPlanner(allow_partial_load=True)
        load(state, checkpoint_id=folder, planner=planner)
        given = {"model_state_dict": state["model"], "optim_state_dict": state["optim"]}
        set_state_dict(self.net, self.optimizer, **given)
        return int(folder.name)

    def save(self, epochs: int) -> None:
        """Save where ``load`` looks."""
        if self.folder is not None:
            save(self._state(), checkpoint_id=self.folder / f"{epochs:04}")

    def _state(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.net, self.optimizer)
        return {"model": model, "optim": optim}


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8, standardized, and their classes."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32, device=device)
    images = (images - images.mean()) / images.std()
    return images.view(-1, 1, 8, 8), torch.tensor(labels, device=device)


def epoch_of(net: nn.Module, optimizer: Any, scaler: Any, seed: int, args: Any) -> Tensor:
    """One pass; each rank has its part of every batch but for tensor parallel. The mean loss."""
    device = next(net.parameters()).device
    images, labels = digits(device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(device)
    rank, world = (0, 1) if args.parallel == "tp" else (dist.get_rank(), dist.get_world_size())
    dtype = AMP[args.amp]
    losses = []
    for batch in torch.split(order, BATCH)[:-1]:
        own = batch[rank::world]
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            loss = F.cross_entropy(net(images[own]).float(), labels[own])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def train(args: argparse.Namespace, device: str) -> list[float]:
    """Train, or go on; the loss of each epoch."""
    torch.manual_seed(0)  # the same weights on every rank
    net: nn.Module = NFNet(CLASSES)
    one_element(net)
    net = parallelized(net.to(device), args.parallel, mesh_for(args.parallel, device))
    groups = param_groups(net, clipping=args.clipping)
    optimizer = SGD_AGC(groups, lr=args.lr, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "fp16")
    checkpoint = Checkpoint(args.checkpoint, net, optimizer)
    losses = []
    for epoch in range(checkpoint.load(), args.epochs):
        losses.append(float(epoch_of(net, optimizer, scaler, epoch, args)))
        checkpoint.save(epoch + 1)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses


def main() -> None:
    """One of the ranks that torchrun starts."""
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    train(args, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
