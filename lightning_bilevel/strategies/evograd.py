"""A hypergradient from the weights of a population: the better a perturbed θ is on g, the more it counts."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner import inner_value_and_grads
from lightning_bilevel.calculus.outer import outer_value, outer_value_and_grads
from lightning_bilevel.calculus.runs import run
from lightning_bilevel.directions import DirectionSampler, Rademacher
from lightning_bilevel.errors import MisconfigurationError, integer, number
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.stationarity import unseen_by_the_minimum
from lightning_bilevel.tree import Params


class EvoGrad(HypergradientStrategy):
    r"""ĝ = c − (1/τ) Σ_k w_k ⟨d, θ_k − θ*⟩ ∂_φ g(θ_k, φ), with w = softmax_k(−g(θ_k, φ)/τ) and θ* = Σ_k w_k θ_k.

    The gradient of f(θ*(φ), φ) for K copies θ_k = θ_T + σ v_k around the end of the inner run, with E[v vᵀ] = I; d and
    c are ∂f/∂θ and ∂f/∂φ at θ*. g is the inner loss, with weight decay, on the last batch of the run (see
    :meth:`BilevelProblem.stationary`).

    Biased and noisy: to leading order E ĝ = c − s d ∂²g/∂θ∂φ with s = (K − 1) σ² / (K τ), that is
    ``ImplicitGradient(Identity(scale=s))``, with noise of relative size √M. s is small, so that an outer optimizer
    which adapts its scale (Adam) suits it. Where all differences of g/τ are below rounding the weights are equal, and ĝ
    is c.
    Memory: O(M + N). Cost: T steps, K inner losses with a gradient by φ, one outer gradient; no second derivatives.

    Source: EvoGrad, Bohdal, Yang and Hospedales, NeurIPS 2021, arXiv 2106.10575; survey, arXiv 2207.11719, eq. 64–65.

    Args:
        num_copies: K, at least 2.
        sigma: σ.
        temperature: τ, in the units of g.
        directions: draws v.

    Raises:
        ValueError: a bad argument.

    >>> EvoGrad(num_copies=2, sigma=0.001, temperature=0.05).differentiates
    frozenset()
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    memory = "O(M + N)"
    cost = "T steps + K inner losses with a gradient by φ"
    supports_stacking = False

    def __init__(
        self,
        num_copies: int = 2,
        sigma: float = 1e-3,
        temperature: float = 0.05,
        directions: DirectionSampler | None = None,
    ) -> None:
        self.num_copies = integer("EvoGrad(num_copies=...)", num_copies, 2)
        self.sigma = number("EvoGrad(sigma=...)", sigma, above=0)
        self.temperature = number("EvoGrad(temperature=...)", temperature, above=0)
        self.directions = directions if directions is not None else Rademacher()

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the gradient by way of the weights; see :meth:`HypergradientStrategy.estimate`."""
        state, metrics = run(problem, problem.start(carry.inner, phi), phi, problem.batches(episode))
        value, observed = outer_value(problem, state, phi, episode)
        taken = len(episode.inner) if problem.solver is not None else problem.inner_steps
        batch = episode.inner[(taken - 1) % len(episode.inner)]
        masks = RngState(tree.device(phi))
        with RngState(tree.device(phi)).fork():  # all copies have the same masks
            offsets, losses, slopes = [], [], []
            for k in range(self.num_copies):
                v = tree.index(self.directions.draw(call.key, k, k + 1, state.params), 0)
                offsets.append(tree.scale(v, self.sigma))
                masks.restore()
                copy = replace(state, params=tree.add(state.params, offsets[-1]))
                loss, _, slope = inner_value_and_grads(problem.stationary(), copy, phi, [batch], by_theta=False)
                losses.append(loss)
                slopes.append(slope)
            weights = torch.softmax(-torch.stack(losses) / self.temperature, 0)
            mean = tree.combine(weights, tree.stack(offsets))
            middle = replace(state, params=tree.add(state.params, mean))
            _, d, grads, _ = outer_value_and_grads(problem, middle, phi, episode)
        for weight, offset, slope in zip(weights, offsets, slopes, strict=True):
            along = tree.dot(d, tree.sub(offset, mean))
            grads = tree.add(grads, tree.scale(slope, -weight * along / self.temperature))
        return Hypergradient(value, grads, state, metrics, observed=observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the inner loss does not depend on in ``problem``."""
        return unseen_by_the_minimum(problem, "EvoGrad", problem.traits.learned())
