"""A penalty for each weight of a logistic regression, learned by implicit differentiation: 64 × 22 numbers a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode

EXAMPLES, FEATURES = 64, 22
LR, TERMS = 0.1, 10
"""Of the inner step, and of the Neumann series, whose α is the inner rate."""


class Penalties(BilevelModule):
    """One step of gradient descent on a logistic regression, from where the last outer step left it."""

    def __init__(self) -> None:
        super().__init__(inner_steps=1, inner_start="warm")
        self.weight = nn.Parameter(torch.zeros(FEATURES))
        self.log_penalty = nn.Parameter(torch.full((FEATURES,), -3.0))

    def inner_parameters(self) -> Any:
        return [self.weight]

    def outer_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, sign = batch
        return F.softplus(-sign * (x @ self.weight)).mean()

    def inner_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.outer_loss(batch) + (self.log_penalty.exp() * self.weight.square()).sum() / 2

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=LR)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.log_penalty], lr=1e-3, fused=True)


def penalties() -> tuple[Penalties, Episode]:
    """Return the module and an episode, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(FEATURES, generator=generator)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(EXAMPLES, FEATURES, generator=generator)
        return x, (x @ truth + torch.randn(EXAMPLES, generator=generator)).sign()

    return Penalties(), Episode([batch()], batch())
