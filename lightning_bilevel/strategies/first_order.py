"""Hypergradient without any derivative of the inner run."""

from __future__ import annotations

from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.truncated_reverse import truncated
from lightning_bilevel.tree import Params


class FirstOrder(HypergradientStrategy):
    r"""ĝ = c + d ∂Ω_0/∂φ: the inner steps count as the identity, dθ_T/dφ ≈ dθ_0/dφ.

    c = ∂f/∂φ and d = ∂f/∂θ_T at θ_T. For parameters shared by both levels this is first-order MAML; for others
    it is the explicit gradient c alone.

    Biased. Memory: nothing beyond θ. Cost: T steps and one gradient of the outer loss.

    Useless where φ acts through the inner loss only (example weights, regularization, a learned rate): the
    estimate is zero there.

    Source: Finn et al., ICML 2017, section 5.2; γ-greedy, section 5.1 (FO).

    >>> FirstOrder().differentiates
    frozenset()
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    memory = "O(1)"
    cost = "T steps + 1 gradient"
    weighs_steps = True

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the first-order estimate; see :meth:`HypergradientStrategy.estimate`."""
        return truncated(problem, carry.inner, phi, episode, last=0)
