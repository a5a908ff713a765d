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
@pytest.mark.parametrize("momentum", ["none", "average", "corrected", "recursive"])
def test_steps_are_those_of_the_algorithm(momentum: Any, batches: int, decay: float) -> None:
    period = 3 if momentum == "recursive" else None
    module, strategy, carry = Warm(1, SGD(0.7, weight_decay=decay)), SOBA(TAU, BETA, ETA, momentum, period), None
    by_hand = ByHand(module, decay)
    theta, phi = module.theta.detach().numpy(), module.phi.detach().numpy().copy()
    v, last = np.zeros(4), None
    for k in range(5):
        episode = sampled(k, batches)
        result = hypergradient(module, strategy, episode, carry=carry)
        used = now = directions(by_hand, episode, theta, v, phi)
        if last is not None and momentum == "average":
            used = (*now[:2], ETA * now[2] + (1 - ETA) * last[0][2])
        if last is not None and (momentum == "corrected" or (period is not None and k % period)):
            past = directions(by_hand, episode, *last[1])
            kept = 1 - ETA if period is None else 1
            used = tuple(d + kept * (old - p) for d, old, p in zip(now, last[0], past, strict=True))
        last = used, (theta, v, phi)
        theta, v = theta - TAU * used[0], v - BETA * used[1]
        np.testing.assert_allclose(result.grads["phi"], used[2], rtol=1e-9)
        np.testing.assert_allclose(result.state.params["theta"], theta, rtol=1e-9)
        np.testing.assert_allclose(result.kept["v"]["theta"], v, rtol=1e-9, atol=1e-14)
        carry, phi = result.carry, phi - 0.05 * used[2]
        with torch.no_grad():
            module.phi.copy_(torch.from_numpy(phi))


@pytest.mark.parametrize("momentum", ["none", "average", "corrected", "recursive"])
def test_it_tends_to_the_hypergradient(momentum: Any) -> None:
    period = 20 if momentum == "recursive" else None
    module, strategy, carry = Warm(1), SOBA(0.4, 0.4, 0.5, momentum, period), None
    functional = module.functional()
    carry = hypergradient(module, strategy, module.episode()).carry
    for _ in range(200):
        result = hypergradient(functional.problem, strategy, module.episode(), phi=functional.phi(), carry=carry)
        carry = result.carry
    assert_close(result.grads, module.optimum(module.episode()).grads, 1e-6)


def test_several_steps_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use `SOBA` with `inner_steps=3`"):
        hypergradient(Warm(), SOBA(), Warm().episode())


def error_after(strategy: SOBA, period: int, steps: int = 400) -> float:
    """Return the distance to ∇h of the mean problem after steps on 8 samples one by one, with all at each period."""
    module, carry = Warm(1), None
    samples = [sampled(k, 1) for k in range(8)]
    inner, outer = ([each.inner[0] for each in samples], [each.outer for each in samples])
    mean = Episode([torch.stack(inner).mean(0)], torch.stack(outer).mean(0))
    chosen = torch.randint(8, (steps,), generator=torch.Generator().manual_seed(0))
    for k in range(steps + 1):
        episode = mean if k % period == 0 else samples[int(chosen[k - 1])]
        result = hypergradient(module, strategy, episode, carry=carry)
        carry = result.carry
    expected = module.optimum(mean).grads["phi"]
    return float((result.grads["phi"] - expected).norm() / expected.norm())


def test_recursive_directions_leave_no_noise_where_plain_ones_do() -> None:
    plain, recursive = error_after(SOBA(0.3, 0.3), 25), error_after(SOBA(0.3, 0.3, 0.9, "recursive", 25), 25)
    assert recursive < 1e-6
    assert plain > 1e-3


@pytest.mark.parametrize(("momentum", "period"), [("recursive", None), ("none", 3), ("recursive", 1)])
def test_a_period_goes_with_recursive_directions(momentum: Any, period: int | None) -> None:
    with pytest.raises(ValueError, match=r"SOBA\(period=\.\.\.\)"):
        SOBA(momentum=momentum, period=period)
