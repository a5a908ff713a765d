"""Differentiable inner optimizers: ``torch.optim``'s values, out of place, differentiable in every argument."""

from lightning_bilevel.inner_optimizers.adagrad import Adagrad
from lightning_bilevel.inner_optimizers.adam import Adam
from lightning_bilevel.inner_optimizers.adamw import AdamW
from lightning_bilevel.inner_optimizers.base import InnerOptimizer
from lightning_bilevel.inner_optimizers.from_torch import from_torch
from lightning_bilevel.inner_optimizers.rmsprop import RMSprop
from lightning_bilevel.inner_optimizers.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "InnerOptimizer", "RMSprop", "from_torch"]
