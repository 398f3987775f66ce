"""Adaptive gradient clipping fused with the optimizer update."""

from agc_triton.clipping import adaptive_clip_grad_, unitwise_norm
from agc_triton.model.groups import param_groups
from agc_triton.optim import AGC, SGD_AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC

__version__ = "0.2.0"

__all__ = [
    "AGC",
    "SGD_AGC",
    "AdamW_AGC",
    "Adam_AGC",
    "RMSprop_AGC",
    "adaptive_clip_grad_",
    "param_groups",
    "unitwise_norm",
]
