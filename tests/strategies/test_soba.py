"""SOBA against its three lines in NumPy, with each kind of momentum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_bilevel import SGD, SOBA, Episode, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from tests.strategies.test_bome import ByHand, Warm
from tests.support.problems import assert_close, draw

TAU, BETA, ETA = 0.2, 0.15, 0.4


def sampled(k: int, batches: int) -> Episode:
    return Episode([draw(4, seed=30 + 10 * k + i) for i in range(batches)], draw(5, seed=29 + 10 * k))


def directions(by_hand: ByHand, episode: Episode, theta: Any, v: Any, phi: Any) -> tuple[Any, Any, Any]:
    """Return D_θ, D_v, D_φ; only the first depends on the inner sample, for g is quadratic."""
    slope = by_hand.A @ theta - by_hand.B @ phi - episode.inner[0].numpy()
    d = by_hand.C.T @ (by_hand.C @ theta - episode.outer.numpy())
    return slope, by_hand.A @ v - d, by_hand.rho * phi + by_hand.B.T @ v


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("momentum", ["none", "average", "corrected"])
def test_steps_are_those_of_the_algorithm(momentum: Any, batches: int, decay: float) -> None:
    module, strategy, carry = Warm(1, SGD(0.7, weight_decay=decay)), SOBA(TAU, BETA, ETA, momentum), None
    by_hand = ByHand(module, decay)
    theta, phi = module.theta.detach().numpy(), module.phi.detach().numpy().copy()
    v, last = np.zeros(4), None
    for k in range(5):
        episode = sampled(k, batches)
        result = hypergradient(module, strategy, episode, carry=carry)
        used = now = directions(by_hand, episode, theta, v, phi)
        if last is not None and momentum == "average":
            used = (*now[:2], ETA * now[2] + (1 - ETA) * last[0][2])
        if last is not None and momentum == "corrected":
            past = directions(by_hand, episode, *last[1])
            used = tuple(d + (1 - ETA) * (old - p) for d, old, p in zip(now, last[0], past, strict=True))
        last = used, (theta, v, phi)
        theta, v = theta - TAU * used[0], v - BETA * used[1]
        np.testing.assert_allclose(result.grads["phi"], used[2], rtol=1e-9)
        np.testing.assert_allclose(result.state.params["theta"], theta, rtol=1e-9)
        np.testing.assert_allclose(result.kept["v"]["theta"], v, rtol=1e-9, atol=1e-14)
        carry, phi = result.carry, phi - 0.05 * used[2]
        with torch.no_grad():
            module.phi.copy_(torch.from_numpy(phi))


@pytest.mark.parametrize("momentum", ["none", "average", "corrected"])
def test_it_tends_to_the_hypergradient(momentum: Any) -> None:
    module, strategy, carry = Warm(1), SOBA(0.4, 0.4, 0.5, momentum), None
    functional = module.functional()
    carry = hypergradient(module, strategy, module.episode()).carry
    for _ in range(200):
        result = hypergradient(functional.problem, strategy, module.episode(), phi=functional.phi(), carry=carry)
        carry = result.carry
    assert_close(result.grads, module.optimum(module.episode()).grads, 1e-6)


def test_several_steps_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use `SOBA` with `inner_steps=3`"):
        hypergradient(Warm(), SOBA(), Warm().episode())
