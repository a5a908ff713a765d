"""Memory that is flat in the number of inner steps: how many of the θ_t are still held while the run goes on."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from lightning_bilevel import (
    ForwardGradient,
    GammaGreedy,
    HypergradientStrategy,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    hypergradient,
)
from lightning_bilevel.linear_solvers import Neumann
from tests.support.problems import Mlp, episodes


class Watched(Mlp):
    """Counts at every inner step how many of the first layer's weights so far are alive."""

    def inner_loss(self, batch: Any) -> Any:
        weight = self.net.first.weight
        if not any(seen() is weight for seen in self.seen):
            self.seen.append(weakref.ref(weight))
        self.held.append(sum(seen() is not None for seen in self.seen))
        return super().inner_loss(batch)


def most_held(strategy: HypergradientStrategy, steps: int) -> int:
    module = Watched("SGD", learned=False)
    module.seen, module.held, module.inner_steps = [], [], steps
    (episode,) = episodes(1)
    hypergradient(module, strategy, episode)
    return max(module.held)


@pytest.mark.parametrize(
    "strategy",
    [
        ForwardGradient(2, chunk_size=1),
        ForwardGradient(2, mode="forward"),
        GammaGreedy(),
        ImplicitGradient(Neumann(2, step_size=0.01)),
        TruncatedReverse(3),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_flat_in_the_number_of_steps(strategy: HypergradientStrategy) -> None:
    assert most_held(strategy, 40) <= most_held(strategy, 10)


def test_a_whole_graph_is_not_flat() -> None:
    assert most_held(ReverseUnroll(), 40) >= 40 > most_held(ReverseUnroll(checkpoint="sqrt"), 40)
