"""Optimizers with adaptive gradient clipping, under the path that they have in agc_optims."""

from agc_triton.optim.adadelta import Adadelta_AGC
from agc_triton.optim.adagrad import Adagrad_AGC
from agc_triton.optim.adam import Adam_AGC
from agc_triton.optim.adamax import Adamax_AGC
from agc_triton.optim.adamw import AdamW_AGC
from agc_triton.optim.asgd import ASGD_AGC
from agc_triton.optim.nadam import NAdam_AGC
from agc_triton.optim.optimizer import AGCOptimizer
from agc_triton.optim.radam import RAdam_AGC
from agc_triton.optim.rmsprop import RMSprop_AGC
from agc_triton.optim.rprop import Rprop_AGC
from agc_triton.optim.sgd import SGD_AGC
from agc_triton.optim.wrapper import AGC

# All there are, by the names of torch's classes: tests, benchmarks and reports go by it.
OPTIMIZERS: dict[str, type[AGCOptimizer]] = {
    cls.__name__.removesuffix("_AGC"): cls
    for cls in (
        *(SGD_AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC, Adagrad_AGC, Adadelta_AGC),
        *(Adamax_AGC, NAdam_AGC, RAdam_AGC, ASGD_AGC, Rprop_AGC),
    )
}

__all__ = [
    "AGC",
    "ASGD_AGC",
    "OPTIMIZERS",
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
]
