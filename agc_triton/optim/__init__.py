"""Optimizers with adaptive gradient clipping, under the path that they have in agc_optims."""

from agc_triton.optim.adam import Adam_AGC
from agc_triton.optim.adamw import AdamW_AGC
from agc_triton.optim.rmsprop import RMSprop_AGC
from agc_triton.optim.sgd import SGD_AGC
from agc_triton.optim.wrapper import AGC

__all__ = ["AGC", "SGD_AGC", "AdamW_AGC", "Adam_AGC", "RMSprop_AGC"]
