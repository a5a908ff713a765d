"""Losses and starts that do more than most: gradients of their own, checkpoints, draws; looped and stacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bilevel import SGD, Episode, ReverseUnroll, hypergradient
from tests.support.shared import EPISODES, Shared, close, episodes


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
