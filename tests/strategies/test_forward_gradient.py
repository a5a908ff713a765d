"""Guided forward gradients: whatever the guide, the same expectation, and the documented error."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from lightning_bilevel import (
    FSLA,
    PZOBO,
    ForwardGradient,
    HypergradientStrategy,
    ReverseUnroll,
    TruncatedReverse,
    hypergradient,
    tree,
)
from lightning_bilevel.directions import DirectionSampler, Gaussian, Orthogonal, Rademacher
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.problem import Traits
from lightning_bilevel.randomness import Key
from tests.support.modules import identical
from tests.support.problems import RidgeSolver, assert_close
from tests.support.pure import BAD, CARRY, EPISODE, EXACT, GOOD, PHI, PROBLEM, Given, N, estimate, partly_right
from tests.support.seeds import call_of, key_of
from tests.support.statistics import UnitLength, check_error, check_mean

SAMPLERS = [Rademacher(), Gaussian(), Orthogonal()]


def test_the_closed_form() -> None:
    torch.testing.assert_close(estimate(ReverseUnroll()), EXACT, rtol=1e-12, atol=1e-12)


# --- Unbiased ---


def many(strategy: ForwardGradient, count: int) -> Tensor:
    """Return independent estimates, ``(count, N)``."""
    return torch.stack([estimate(strategy, seed) for seed in range(count)])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("guide", [GOOD, BAD, TruncatedReverse(1)], ids=["good", "bad", "TruncatedReverse"])
def test_unbiased_whatever_the_guide(guide: HypergradientStrategy, sampler: DirectionSampler) -> None:
    # The vectorized engine takes 60 random directions at the price of few.
    check_mean(many(ForwardGradient(61, sampler, guide=guide, mode="forward"), 30), EXACT)


class Recorded(Rademacher):
    """Keeps what it drew."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def flat(self, key: Key, start: int, stop: int, like: Tensor) -> Tensor:
        self.drawn.append(super().flat(key, start, stop, like))
        return self.drawn[-1]


def test_directions_of_the_guide_are_independent_of_the_others() -> None:
    cosines = []
    for seed in range(20):
        sampler = Recorded()
        estimate(ForwardGradient(2, sampler, guide=ForwardGradient(1, sampler)), seed)
        guide, other = sampler.drawn
        cosines.append((guide[0] @ other[0] / N).item())
    assert max(map(abs, cosines)) < 1
    assert abs(sum(cosines)) / 20 <= 4 / (20 * N) ** 0.5  # cosines of random signs have variance 1/N


def by_hand(seed: int, guide: Given = BAD, project: bool = True, divisor: int = 2) -> Tensor:
    """Return s·u + (1/(b−1)) Σ ⟨∇h, p⟩ p of three directions from the exact ∇h."""
    u = guide.direction / guide.direction.norm()
    v = Rademacher().flat(key_of(seed), 0, 2, EXACT)
    p = v - torch.outer(v @ u, u) if project else v
    return (EXACT @ u) * u + p.T @ (p @ EXACT) / divisor


def test_the_definition() -> None:
    for seed in range(3):
        expected = by_hand(seed)
        for options in ({}, {"mode": "forward"}, {"chunk_size": 1}, {"chunk_size": 2}):
            actual = estimate(ForwardGradient(3, guide=BAD, **options), seed)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_check_rejects_broken_estimates() -> None:
    check_mean(torch.stack([by_hand(seed) for seed in range(500)]), EXACT)
    # The guide's direction counted among the random ones.
    with pytest.raises(AssertionError, match="^the mean is off by"):
        check_mean(torch.stack([by_hand(seed, divisor=3) for seed in range(500)]), EXACT)
    # Directions that are not projected.
    with pytest.raises(AssertionError, match="^the mean is off by"):
        check_mean(torch.stack([by_hand(seed, GOOD, project=False) for seed in range(500)]), EXACT)
    # Directions of length 1.
    with pytest.raises(AssertionError, match="^the mean is off by"):
        check_mean(many(ForwardGradient(61, UnitLength(), guide=BAD, mode="forward"), 30), EXACT)


# --- Error ---

HALF_RIGHT = Given(partly_right(0.5))


@cache
def measured(sampler: type[DirectionSampler]) -> Tensor:
    """Return estimates of 33 directions, one of them the guide's."""
    return many(ForwardGradient(33, sampler(), guide=HALF_RIGHT, mode="forward"), 150)


def documented(sampler: type[DirectionSampler]) -> float:
    """Return E‖ĝ − ∇h‖² / ‖∇h‖²."""
    u = HALF_RIGHT.direction / HALF_RIGHT.direction.norm()
    w = EXACT - (EXACT @ u) * u
    if sampler is Gaussian:
        return float(N * w @ w / 32 / (EXACT @ EXACT))
    return float(((N - 2) * w @ w + 2 * (w.square() * u.square()).sum()) / 32 / (EXACT @ EXACT))


@pytest.mark.parametrize("sampler", [Rademacher, Gaussian])
def test_error_is_the_documented_one(sampler: type[DirectionSampler]) -> None:
    check_error(measured(sampler), EXACT, documented(sampler))


def test_the_error_check_tells_samplers_apart() -> None:
    for sampler, other in ((Rademacher, Gaussian), (Gaussian, Rademacher)):
        with pytest.raises(AssertionError, match="^error "):
            check_error(measured(sampler), EXACT, documented(other))


@pytest.mark.parametrize("length", [1e-20, 1.0, -1e20])
def test_a_perfect_guide_gives_the_exact_answer(length: float) -> None:
    for directions in (2, 5):
        guided = ForwardGradient(directions, Gaussian(), guide=Given(length * EXACT))
        torch.testing.assert_close(estimate(guided), EXACT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimate(ForwardGradient(2, guide=ReverseUnroll())), EXACT, rtol=1e-12, atol=1e-12)


# --- Guides that give nothing ---


@pytest.mark.parametrize("entry", [0.0, float("nan"), float("inf")])
def test_without_a_direction_it_goes_on_unguided_and_says_so_once(entry: float) -> None:
    guide = Given(torch.zeros(N, dtype=torch.float64))
    guide.direction[0] = entry
    strategy, problem = ForwardGradient(4, guide=guide), replace(PROBLEM, findings={})

    def guided(seed: int) -> Tensor:
        return tree.flatten(strategy.estimate(problem, CARRY, PHI, EPISODE, call_of(seed)).grads)

    with pytest.warns(
        UserWarning, match=f"^The guide `Given` gave an estimate of norm {entry}; `ForwardGradient` goes on"
    ):
        first = guided(0)
    torch.testing.assert_close(first, estimate(ForwardGradient(4)), rtol=0, atol=0)
    torch.testing.assert_close(guided(1), estimate(ForwardGradient(4), 1), rtol=0, atol=0)
    guide.direction = EXACT
    torch.testing.assert_close(guided(2), EXACT)


def test_a_guide_needs_a_second_direction() -> None:
    with pytest.raises(
        ValueError, match=r"^Expected `ForwardGradient\(num_directions=\.\.\.\)` to be at least 2 with a"
    ):
        ForwardGradient(1, guide=GOOD)


def test_what_the_guide_refuses_is_refused() -> None:
    module = RidgeSolver()
    with pytest.raises(MisconfigurationError, match="^Cannot use `FSLA` with `solve_inner`"):
        hypergradient(module, ForwardGradient(2, guide=FSLA()), module.episode())
    hypergradient(module, ForwardGradient(2, guide=PZOBO()), module.episode())


def test_truncation_guides_perfectly_through_a_solver() -> None:
    """A user's solver is a run of one step."""
    module = RidgeSolver()
    grads = hypergradient(module, ForwardGradient(2, guide=TruncatedReverse(1)), module.episode()).grads
    assert_close(grads, module.optimum(module.episode()).grads, 1e-10)


def test_what_the_guide_carries_is_carried() -> None:
    problem = replace(PROBLEM, inner_steps=1, traits=Traits(warm=True))
    strategy, alone, carry, own = ForwardGradient(2, guide=FSLA()), FSLA(), CARRY, CARRY
    for k in (1, 2, 3):
        result = strategy.estimate(problem, carry, PHI, EPISODE, call_of())
        guess = alone.estimate(problem, own, PHI, EPISODE, call_of())
        given = ForwardGradient(2, guide=Given(tree.flatten(guess.grads)))
        assert_close(result.grads, given.estimate(problem, carry, PHI, EPISODE, call_of()).grads, 1e-12)
        assert result.kept["guide/k"]["k"] == k
        assert identical(result.carry.of("guide").strategy, guess.kept)
        carry, own = result.carry, guess.carry
    assert ForwardGradient(2).estimate(problem, carry, PHI, EPISODE, call_of()).kept == {}
