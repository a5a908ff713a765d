"""Differentiable inner optimizers: ``torch.optim``'s values, out of place, differentiable in every argument."""

from lightning_bilevel.inner_optimizers.adadelta import Adadelta
from lightning_bilevel.inner_optimizers.adagrad import Adagrad
from lightning_bilevel.inner_optimizers.adam import Adam
from lightning_bilevel.inner_optimizers.adamax import Adamax
from lightning_bilevel.inner_optimizers.adamw import AdamW
from lightning_bilevel.inner_optimizers.base import InnerOptimizer, PerStep
from lightning_bilevel.inner_optimizers.from_torch import from_torch
from lightning_bilevel.inner_optimizers.hyper import safe_sqrt
from lightning_bilevel.inner_optimizers.lion import Lion
from lightning_bilevel.inner_optimizers.nadam import NAdam
from lightning_bilevel.inner_optimizers.radam import RAdam
from lightning_bilevel.inner_optimizers.rmsprop import RMSprop
from lightning_bilevel.inner_optimizers.sgd import SGD

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "InnerOptimizer",
    "Lion",
    "NAdam",
    "PerStep",
    "RAdam",
    "RMSprop",
    "from_torch",
    "safe_sqrt",
]
