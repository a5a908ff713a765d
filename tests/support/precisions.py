"""A problem that all strategies take in every precision, and one step of a fit on it."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_bilevel import SGD, BilevelModule, Episode, HypergradientStrategy, hypergradient
from tests.support.fits import fit
from tests.support.modules import EXAMPLES, FEATURES, examples
from tests.support.seeds import seeded
from tests.support.tables import Row


class Cleaning(BilevelModule):
    """Example weights outside, which both losses read; a net inside, under plain descent: all strategies take it.

    Args:
        factor: of both losses; the inner learning rate is divided by it, so that the run is the same.
        options: of ``BilevelModule``.
    """

    def __init__(self, factor: float = 1.0, **options: Any) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", **options})
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1))
        self.example_weights = nn.Parameter(torch.linspace(-1, 1, EXAMPLES))
        self.factor, self.found = factor, torch.zeros(())

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        return self.factor * (self.example_weights[index].sigmoid() * (self.net(x) - y).square().mean(1)).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        error = (self.net(batch[0]) - batch[1]).square().mean()  # PyTorch 2.4 has no `mse_loss` in half precision
        return self.factor * (error + 0.001 * self.example_weights.square().sum())

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.3 / self.factor)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.found = self.example_weights.grad.clone()


def made(row: Row, **options: Any) -> tuple[Cleaning, HypergradientStrategy]:
    module = seeded(lambda: Cleaning(**row.needs, **options))
    return module, row.build(module)


EPISODE = Episode([examples(0)], examples(1)[:2])


def fitted(module: Cleaning, strategy: HypergradientStrategy, **options: Any) -> Tensor:
    """Take one step of a real fit; return the gradient that the outer optimizer got."""
    fit(strategy, module=module, batches=[EPISODE], seed=3, **options)
    return module.found


def by_hand(module: Cleaning, strategy: HypergradientStrategy, dtype: torch.dtype) -> Tensor:
    episode = tree_map(lambda value: value.to(dtype) if value.is_floating_point() else value, EPISODE)
    return hypergradient(module.to(dtype), strategy, episode, seed=3).grads["example_weights"]


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def half(device: str = "cpu") -> dict[str, Any]:
    """Return the option of a Trainer for 16-mixed on a CPU, which Lightning replaces if asked by name."""
    return {"plugins": [MixedPrecision("16-mixed", device)]}
