"""Stochastic strategies: the mean of many estimates is ∇h, and their error is the documented one.

Seeds are fixed, so every test gives the same answer every time; broken fakes show that the checks can fail. Where many
estimates are needed, directional derivatives come from a closed form: that the engines compute them is
what `test_exact.py` says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import FirstOrder, ForwardGradient, Hypergradient, HypergradientStrategy, TruncatedReverse, tree
from lightning_bilevel.directions import Blocks, DirectionSampler, Gaussian, Orthogonal, Rademacher
from lightning_bilevel.problem import Carry, InnerState
from lightning_bilevel.strategies import forward_gradient
from lightning_bilevel.strategies.slopes import Slopes
from lightning_bilevel.tree import Params
from tests.support.problems import Quadratic
from tests.support.seeds import call_of
from tests.support.statistics import UnitLength, check_error, check_mean
from tests.support.tables import SAMPLERS

MODULE = Quadratic(inner_steps=2, shared=True)  # φ is two tensors: a direction has to cover both
EPISODE = MODULE.episode()
SOLUTION = MODULE.solution(EPISODE)
EXACT = tree.flatten(SOLUTION.grads)
N = len(EXACT)
ROUNDING = 1e-7 * EXACT.norm()


def estimates(strategy: HypergradientStrategy, count: int) -> Tensor:
    """Return independent estimates, ``(count, N)``."""
    functional = MODULE.functional()
    problem, phi, carry = functional.problem, functional.phi(), Carry(InnerState({}))
    calls = [call_of(seed=7, estimate=i) for i in range(count)]
    return torch.stack([tree.flatten(strategy.estimate(problem, carry, phi, EPISODE, call).grads) for call in calls])


class ClosedForm(Slopes):
    """⟨∇h, v⟩ from the closed form of ∇h, whatever the problem."""

    def __init__(self, *args: Any) -> None:
        pass

    def chunk_size(self) -> int:
        return 1000

    def along(self, directions: Params) -> Tensor:
        return tree.rows_dot(directions, SOLUTION.grads)

    def result(self, grads: Params) -> Hypergradient:
        return Hypergradient(SOLUTION.value, grads, InnerState({}), {})


def in_closed_form(strategy: HypergradientStrategy, count: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_gradient, "TangentSlopes", ClosedForm)
        return estimates(strategy, count)


def check_unbiased(strategy: HypergradientStrategy) -> None:
    check_mean(in_closed_form(strategy, 400), EXACT, ROUNDING)


def check_documented(strategy: HypergradientStrategy, error: float) -> None:
    check_error(in_closed_form(strategy, 1000), EXACT, error)


def name(value: object) -> str:
    return type(value).__name__


class Guess(FirstOrder):
    """A guide: half the hypergradient, half something else."""

    guess = tree.unflatten(EXACT / EXACT.norm() + torch.linspace(-0.5, 0.5, N, dtype=torch.float64), SOLUTION.grads)

    def estimate(self, *args: Any) -> Hypergradient:
        return Hypergradient(SOLUTION.value, self.guess, InnerState({}), {})


# --- Broken fakes ---


class OneCoordinateOff(ForwardGradient):
    """5% too large in one coordinate."""

    def estimate(self, *args: Any) -> Hypergradient:
        result = super().estimate(*args)
        scale = torch.ones_like(EXACT)
        scale[EXACT.abs().argmax()] = 1.05
        return result._replace(grads=tree.unflatten(scale * tree.flatten(result.grads), result.grads))


class OneDirectionLess(ForwardGradient):
    """Unbiased, but the last direction is the first one again."""

    def estimate(self, *args: Any) -> Hypergradient:
        first, rest = (ForwardGradient(count).estimate(*args) for count in (1, self.num_directions))
        weight = 1 / (self.num_directions + 1)
        return rest._replace(grads=tree.add(tree.scale(rest.grads, 1 - weight), first.grads, alpha=weight))


@pytest.mark.parametrize(
    "fake", [ForwardGradient(16, UnitLength()), OneCoordinateOff(64), TruncatedReverse(steps=1)], ids=name
)
def test_the_check_of_means_rejects_bias(fake: HypergradientStrategy) -> None:
    with pytest.raises(AssertionError, match=r"^the mean is off by \d"):
        check_unbiased(fake)


@pytest.mark.parametrize("fake", [ForwardGradient(4, Gaussian()), OneDirectionLess(3)], ids=name)
def test_the_check_of_errors_rejects_other_errors(fake: ForwardGradient) -> None:
    check_unbiased(fake)
    with pytest.raises(AssertionError, match=r"^error "):
        check_documented(fake, (N - 1) / 4)


# --- The strategies ---


@pytest.mark.parametrize("mode", ["double_backward", "forward"])
def test_forward_gradient_is_unbiased_on_its_engines(mode: Any) -> None:
    samples = estimates(ForwardGradient(4, mode=mode), 50)
    check_mean(samples, EXACT, ROUNDING)
    torch.testing.assert_close(samples, in_closed_form(ForwardGradient(4), 50))


@pytest.mark.parametrize("directions", [1, 16])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
def test_forward_gradient_is_unbiased(sampler: DirectionSampler, directions: int) -> None:
    check_unbiased(ForwardGradient(directions, sampler))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
def test_error_is_the_documented_one(sampler: DirectionSampler) -> None:
    documented = {Gaussian: N + 1, Orthogonal: N - 4, Blocks: N - (getattr(sampler, "blocks", None) or 4)}
    check_documented(ForwardGradient(4, sampler), documented.get(type(sampler), N - 1) / 4)


@pytest.mark.parametrize("directions", [1, 2, 8, 32])
def test_error_falls_with_the_number_of_directions(directions: int) -> None:
    check_documented(ForwardGradient(directions), (N - 1) / directions)  # Lemma 3.1


@pytest.mark.parametrize("sampler", SAMPLERS, ids=name)
def test_guided_forward_gradient_is_unbiased(sampler: DirectionSampler) -> None:
    check_unbiased(ForwardGradient(5, sampler, guide=Guess()))


@pytest.mark.parametrize("sampler", [Rademacher(), Gaussian()], ids=name)
def test_guided_error_is_the_documented_one(sampler: DirectionSampler) -> None:
    u = tree.flatten(Guess.guess)
    u = u / u.norm()
    w = EXACT - (EXACT @ u) * u
    documented = N * w.square().sum()
    if isinstance(sampler, Rademacher):
        documented = (N - 2) * w.square().sum() + 2 * (w.square() * u.square()).sum()
    check_documented(ForwardGradient(5, sampler, guide=Guess()), (documented / EXACT.square().sum()).item() / 4)
