"""A learned initialization on three episodes, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, Episode, Hypergradient
from tests.support.problems import assert_close
from tests.support.seeds import forked

EPISODES = 3


class Shared(BilevelModule):
    """A learned initialization."""

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__(inner_steps=2, inner_start="reset", episode_chunk_size=chunk)
        with forked(0):
            self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def inner_parameters(self) -> Any:
        return list(self.parameters())

    outer_parameters = inner_parameters

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())

    def inner_loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    outer_loss = inner_loss

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=0.3)


def episodes(whole: bool = False) -> list[Episode]:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randint(4, (4, 3), generator=generator)
        y = torch.randn(4, 1, generator=generator, dtype=torch.float64)
        return (x if whole else x.double()), y

    return [Episode([batch()], batch()) for _ in range(EPISODES)]


def close(found: Hypergradient, expected: Hypergradient) -> None:
    assert_close({"h": found.value, **found.grads}, {"h": expected.value, **expected.grads}, 1e-12)
