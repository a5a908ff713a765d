"""Which parameters are inner and which are outer: one level named or both, as lists, in one outer optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, BilevelModule, ForwardGradient, ReverseUnroll, TruncatedReverse, hypergradient
from tests.support.modules import Cleaning, differing, loader, parameters, trainer
from tests.support.seeds import seeded


def test_an_outer_optimizer_over_all_parameters_leaves_the_inner_ones_alone():
    class All(Cleaning):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.5)

    class Outer(Cleaning):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.outer_parameters(), lr=0.05, weight_decay=0.5)

    modules = [seeded(All), seeded(Outer)]
    for module in modules:
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(*map(parameters, modules)) == []


class Penalized(BilevelModule):
    """Uses both levels in a loss, and one for the outer optimizer."""

    def __init__(self) -> None:
        super().__init__(inner_steps=2)
        self.net, self.log_penalty = nn.Linear(3, 1), nn.Parameter(torch.zeros(4))

    def inner_loss(self, batch: Any) -> Tensor:
        [log_penalty] = self.outer_parameters()
        penalty = sum((log_penalty.exp() * p.square().mean()).sum() for p in self.inner_parameters())
        return (self.net(batch[0]) - batch[1]).square().mean() + penalty

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.outer_parameters(), lr=0.05)


class NamesInner(Penalized):
    def inner_parameters(self) -> Any:
        return self.net.parameters()


class NamesOuter(Penalized):
    def outer_parameters(self) -> Any:
        return [self.log_penalty]


class NamesBoth(NamesInner, NamesOuter):
    pass


@pytest.mark.parametrize("named", [NamesInner, NamesOuter])
def test_the_other_level_is_all_the_rest_everywhere(named):
    both, one = seeded(NamesBoth), seeded(named)
    episode = next(iter(loader()))
    for strategy in (ReverseUnroll(), TruncatedReverse(), ForwardGradient(num_directions=2, mode="forward")):
        expected, got = (hypergradient(module, strategy, episode) for module in (both, one))
        assert differing(expected.grads, got.grads) == []
    for module in (both, one):
        trainer(ReverseUnroll()).fit(module, loader())
        with module.adapted(episode.inner):
            module.loss = module.inner_loss(episode.inner[0]).item()
    assert differing(*map(parameters, (both, one))) == []
    assert both.loss == one.loss


def test_levels_may_be_lists_of_parameters_and_submodules():
    class Module(Cleaning):
        def inner_parameters(self):
            return [self.net[0], self.net[2].weight, self.net[2].bias]

    modules = [seeded(Module), seeded(Cleaning)]
    for module in modules:
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(*map(parameters, modules)) == []
