"""Accelerate: a prepared model and optimizer."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from agc_triton import AdamW_AGC, param_groups


def test_a_prepared_optimizer_steps_as_a_plain_one() -> None:
    results = []
    for accelerator in (None, Accelerator(cpu=True, gradient_accumulation_steps=2)):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        groups = param_groups(model, weight_decay=0.1)
        optimizer = AdamW_AGC(groups, lr=1e-2, clipping=0.1)
        batches = torch.randn(4, 8, 4)
        if accelerator is None:
            for first, second in zip(batches[::2], batches[1::2], strict=True):
                optimizer.zero_grad()
                ((model(first).square().mean() + model(second).square().mean()) / 2).backward()
                optimizer.step()
        else:
            model, optimizer = accelerator.prepare(model, optimizer)
            names = [g["param_names"] for g in param_groups(model, weight_decay=0.1)]
            assert names == [g["param_names"] for g in groups]
            for batch in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(model(batch).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(results[0], results[1])
