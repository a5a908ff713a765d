"""Losses and starts that do more than most: gradients of their own, checkpoints, padding, draws; looped and stacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    ForwardUnroll,
    Hypergradient,
    ReverseUnroll,
    hypergradient,
)
from lightning_bilevel.kernels.embedding import NATIVE, embedding
from tests.support.problems import assert_close, seeded

EPISODES = 3


class Shared(BilevelModule):
    """A learned initialization."""

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__(inner_steps=2, inner_start="reset", episode_chunk_size=chunk)
        with seeded(0):
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


class Embedded(Shared):
    def __init__(self, chunk: int | None = None) -> None:
        super().__init__(chunk)
        with seeded(0):
            self.table = nn.Embedding(4, 3, padding_idx=0).double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.table(x).mean(1))


def test_padding_of_every_episode_stays_as_it_is() -> None:
    """PyTorch's own rule for ``vmap`` leaves out the gradient of the first episode's padding only."""
    looped, stacked = (hypergradient(Embedded(chunk), ReverseUnroll(), episodes(whole=True)) for chunk in (1, None))
    close(stacked, looped)
    assert stacked.state.params["table.weight"].shape == (EPISODES, 4, 3)
    assert not stacked.state.params["table.weight"][:, 0].any()
    close(hypergradient(Embedded(), ForwardUnroll(mode="forward"), episodes(whole=True)), looped)


def test_an_embedding_under_vmap() -> None:
    tables = torch.randn(EPISODES, 5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1, 1], [2, 1, 4], [1, 1, 1]])
    expected = torch.stack([NATIVE(table, row, 1) for table, row in zip(tables, index, strict=True)])
    found = vmap(lambda table, row: embedding(table, row, 1))(tables, index)
    assert torch.equal(found, expected)
    of_found, of_expected = (torch.autograd.grad(value.sin().sum(), tables)[0] for value in (found, expected))
    torch.testing.assert_close(of_found, of_expected)


class Physical(Shared):
    """Its inner loss takes the derivative of the net; a buffer is all that is constant."""

    def __init__(self, with_buffer: bool) -> None:
        super().__init__()
        if with_buffer:
            self.register_buffer("scale", torch.ones(1, dtype=torch.float64))

    def inner_loss(self, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return slope.square().mean() + super().inner_loss(batch)


def test_gradients_within_a_loss() -> None:
    without, with_buffer = (hypergradient(Physical(flag), ReverseUnroll(), episodes()[0]) for flag in (False, True))
    close(with_buffer, without)


class Checkpointed(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False))


def test_checkpoints_of_several_episodes_are_looped() -> None:
    """They run forward under ``vmap``, and fail backward."""
    with pytest.warns(UserWarning, match="^The losses cannot be vectorized over episodes"):
        found = hypergradient(Checkpointed(), ReverseUnroll(), episodes())
    close(found, hypergradient(Shared(1), ReverseUnroll(), episodes()))


class Drawn(Shared):
    def initial_inner_parameters(self) -> Any:
        return {name: value + torch.rand_like(value) for name, value in self.named_parameters()}


def test_random_starts_differ_between_stacked_episodes() -> None:
    one = episodes()[0]
    ends = hypergradient(Drawn(), ReverseUnroll(), [one] * EPISODES).state.params["first.weight"]
    assert not torch.equal(ends[0], ends[1])
    again = hypergradient(Drawn(), ReverseUnroll(), [one] * EPISODES).state.params["first.weight"]
    assert torch.equal(ends, again)


def test_within_inference_mode() -> None:
    """As in a ``validation_step``."""
    expected = hypergradient(Shared(), ReverseUnroll(), episodes())
    with torch.inference_mode():
        here = [Episode([tuple(part * 1 for part in e.inner[0])], tuple(part * 1 for part in e.outer))
                for e in episodes()]  # fmt: skip
        close(hypergradient(Shared(), ReverseUnroll(), here), expected)


class Table(Shared):
    """A learned rate for every step: there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner_steps, self.rates = 1, nn.Parameter(torch.full((1,), 0.1, dtype=torch.float64))

    def configure_inner_optimizer(self) -> Any:
        return ByStep(self.rates)


class ByStep(SGD):
    def __init__(self, rates: Tensor) -> None:
        super().__init__()
        self.rates = rates

    def rule(self, values: Any, step: int) -> Any:
        return super().rule((self.rates[step - 1], *values[1:]), step)


def test_a_table_of_rates_is_read_no_further_than_the_run() -> None:
    assert hypergradient(Table(), ReverseUnroll(), episodes()[0]).grads["rates"] != 0
