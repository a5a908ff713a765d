"""Memory that is flat in the number of inner steps: how many of the θ_t are still held while the run goes on."""

from __future__ import annotations

import pytest

from lightning_bilevel import ForwardGradient, GammaGreedy, HypergradientStrategy, ImplicitGradient, TruncatedReverse
from lightning_bilevel.linear_solvers import Neumann
from tests.support.watched import most_held


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
