"""Right and wrong uses, for type checkers: mypy must need each ignore here, and no other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

from agc_triton import (
    AGC,
    SGD_AGC,
    Adam_AGC,
    AdamW_AGC,
    RMSprop_AGC,
    adaptive_clip_grad_,
    param_groups,
)

model = nn.Linear(2, 2)
p = list(model.parameters())

AdamW_AGC(p, learning_rate=1e-3)  # type: ignore[call-arg]
SGD_AGC(p, lr="x")  # type: ignore[arg-type]
RMSprop_AGC(p, betas=(0.9, 0.99))  # type: ignore[call-arg]
Adam_AGC(p, betas=0.9)  # type: ignore[arg-type]
SGD_AGC(p, clipping="x")  # type: ignore[arg-type]
SGD_AGC(p, cliping=0.1)  # type: ignore[call-arg]
SGD_AGC(p, 0.1, 0.9, 0.0, 0.0, True, 0.01)  # type: ignore[arg-type, call-arg]
adaptive_clip_grad_(p, 0.01)  # type: ignore[call-arg]
AGC(p)  # type: ignore[arg-type]
AGC(SGD(p), cliping=0.1)  # type: ignore[call-arg]

sgd = SGD_AGC(p, 0.1, 0.9, nesterov=True, clipping=None, unit_dim=((0, 2), 1), backend="torch")
adam = Adam_AGC(p, torch.tensor(0.1), (0.9, 0.99), amsgrad=True, decoupled_weight_decay=True)
adamw = AdamW_AGC(param_groups(model), lr=1e-3, foreach=True, nonfinite="skip_unit")
rmsprop = RMSprop_AGC(model.named_parameters(), alpha=0.9, centered=True, agc_eps=1e-4)
wrapped = AGC(SGD(p), clipping=0.1, backend="auto", nonfinite="raise")
optimizers: list[Optimizer] = [sgd, adam, adamw, rmsprop, wrapped]
StepLR(wrapped, 1)


def as_tensor() -> Tensor:
    return torch.zeros(())


def as_float() -> float:
    return 0.0


loss: Tensor = sgd.step(as_tensor)
loss = wrapped.step(as_tensor)
value: float = adamw.step(as_float)
sgd.step()
wrong: str = sgd.step(as_float)  # type: ignore[assignment]
sgd.backend = 1  # type: ignore[assignment]
sgd.backend = "torch"
adaptive_clip_grad_(p, clipping=0.01, unit_dim="tensor")
