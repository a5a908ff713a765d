"""A bilevel module that works, made to be spoilt in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode
from tests.support.modules import examples


class Net(BilevelModule):
    """A bilevel module that works; every case spoils it in one way."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"inner_steps": 3, "inner_start": "reset", **options})
        self.net, self.log_penalty = nn.Linear(3, 1), nn.Parameter(torch.zeros(1))

    def inner_parameters(self) -> Any:
        return self.net

    def inner_loss(self, batch: Any) -> Tensor:
        return self.outer_loss(batch) + (self.log_penalty.exp() * self.net.weight.square()).sum()

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def net(options: dict[str, Any] | None = None, **methods: Any) -> Net:
    """Return a ``Net`` whose class has other ``methods``; ``None`` puts the default hook back."""
    methods = {name: getattr(BilevelModule, name) if method is None else method for name, method in methods.items()}
    return type("Net", (Net,), methods)(**(options or {}))


def without_levels() -> Net:
    return net(inner_parameters=None)


X, Y = examples(0)[:2]
EPISODE = Episode([(X, Y)], (X, Y))


def zeros(self: Net) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) * self.log_penalty for name, p in self.net.named_parameters(prefix="net")}
