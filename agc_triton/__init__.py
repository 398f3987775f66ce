"""Adaptive gradient clipping fused with the optimizer update."""

from agc_triton.choosing.suggest import suggest_clipping
from agc_triton.clipping import adaptive_clip_grad_, unitwise_norm
from agc_triton.model.groups import param_groups
from agc_triton.optim import (
    AGC,
    ASGD_AGC,
    SGD_AGC,
    Adadelta_AGC,
    Adagrad_AGC,
    Adam_AGC,
    Adamax_AGC,
    AdamW_AGC,
    NAdam_AGC,
    RAdam_AGC,
    RMSprop_AGC,
    Rprop_AGC,
)

__version__ = "0.2.0"

__all__ = [
    "AGC",
    "ASGD_AGC",
    "SGD_AGC",
    "Adadelta_AGC",
    "Adagrad_AGC",
    "AdamW_AGC",
    "Adam_AGC",
    "Adamax_AGC",
    "NAdam_AGC",
    "RAdam_AGC",
    "RMSprop_AGC",
    "Rprop_AGC",
    "adaptive_clip_grad_",
    "param_groups",
    "suggest_clipping",
    "unitwise_norm",
]
