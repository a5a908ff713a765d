"""Shares of directions: their mean is the whole, and an empty one still takes the inner steps."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import PZOBO, ForwardGradient, HypergradientStrategy, ZerothOrder, tree
from lightning_bilevel.directions import Orthogonal
from tests.support.pure import CARRY, EPISODE, GOOD, PHI, PROBLEM, STEPS, N, estimate
from tests.support.seeds import call_of

DIRECTION_PARALLEL: dict[str, HypergradientStrategy] = {
    "plain": ForwardGradient(4),
    "plain, chunks": ForwardGradient(4, chunk_size=1),
    "plain, Orthogonal": ForwardGradient(4, Orthogonal()),
    "guided": ForwardGradient(4, guide=GOOD),
    "guided, chunks": ForwardGradient(4, guide=GOOD, chunk_size=1),
    "guided by directions": ForwardGradient(4, guide=ForwardGradient(3)),
    "PZOBO": PZOBO(4, mu=0.1),
    "PZOBO, chunks": PZOBO(4, mu=0.1, chunk_size=1),
    "ZerothOrder": ZerothOrder(4, mu=0.1),
    "ZerothOrder, central": ZerothOrder(4, mu=0.1, scheme="central"),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", DIRECTION_PARALLEL)
def test_the_mean_over_shares_is_the_whole(name: str, ranks: int) -> None:
    strategy = DIRECTION_PARALLEL[name]
    assert strategy.direction_parallel
    whole = estimate(strategy, 3)
    shares = torch.stack([estimate(strategy, 3, (rank, ranks)) for rank in range(ranks)])
    torch.testing.assert_close(shares.mean(0), whole, rtol=1e-12, atol=1e-12)
    if ranks > 1:
        assert (shares - whole).abs().max() > 1e-3  # a share by itself is not the estimate


@pytest.mark.parametrize("name", DIRECTION_PARALLEL)
def test_an_empty_share_still_takes_the_inner_steps(name: str) -> None:
    calls = call_of(3), call_of(3, shard=(4, 5))
    whole, empty = (DIRECTION_PARALLEL[name].estimate(PROBLEM, CARRY, PHI, EPISODE, call) for call in calls)
    explicit = 0.2 * tree.flatten(PHI) if "PZOBO" in name else torch.zeros(N, dtype=torch.float64)
    torch.testing.assert_close(tree.flatten(empty.grads), explicit)
    assert torch.equal(empty.state.params["w"], whole.state.params["w"])
    assert empty.state.steps == STEPS
    torch.testing.assert_close(empty.value, whole.value, rtol=1e-15, atol=0)
    torch.testing.assert_close(empty.metrics, whole.metrics)
