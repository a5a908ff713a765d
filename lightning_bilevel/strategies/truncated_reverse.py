"""Hypergradient through the last inner steps only."""

from __future__ import annotations

from dataclasses import replace

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import gradients
from lightning_bilevel.calculus.inner_loop import run, vector_jacobian
from lightning_bilevel.errors import integer
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.reverse_unroll import unrolled
from lightning_bilevel.tree import Params


class TruncatedReverse(HypergradientStrategy):
    r"""ĝ = c_T + Σ_{t > T-K} d_T A_T ⋯ A_{t+1} B_t: the reverse recursion stopped after K steps.

    Biased: for a strongly convex g (modulus α) and gradient descent at rate η the error is at most
    (1−ηα)^K / (ηα) · ‖d_T‖ max‖B_t‖. ``steps >= T`` is exact. Where the start Ω_0 depends on φ (parameters shared by
    both levels), d_{T-K} ∂Ω_0/∂φ is added: the steps before the cut count as the identity, as in first-order MAML.

    Memory: the activations of K inner steps. Cost: T steps and K second-order backward steps.

    Good where the outer parameters act late and directly; misleading where they act early (a
    learned initialization, long horizons). ``steps=1`` is T1–T2.

    Source: (FG)²U, arXiv 2406.14095, eq. 21–22; Shaban et al., AISTATS 2019.

    Args:
        steps: K, the inner steps that are differentiated.

    Raises:
        ValueError: ``steps`` is not a positive integer.

    >>> TruncatedReverse(steps=5).steps
    5
    """

    exact = False
    unbiased = False
    requires = "step"
    second_order = True
    memory = "O(K) activations"
    cost = "T steps + K second-order backward steps"

    def __init__(self, steps: int = 1) -> None:
        self.steps = integer("TruncatedReverse(steps=...)", steps)

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the truncated hypergradient; see :meth:`HypergradientStrategy.estimate`."""
        if self.steps >= problem.inner_steps:
            return unrolled(problem, memory, phi, episode)
        return truncated(problem, memory, phi, episode, self.steps)


def truncated(problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, steps: int) -> Hypergradient:
    """Run T - ``steps`` inner steps without a graph and the rest with one; differentiate the rest."""
    batches = problem.batches(episode)
    cut = len(batches) - steps
    outer = tree.leaves(phi)
    start = problem.start(memory, outer)
    through_start = {name: value for name, value in start.params.items() if value.requires_grad}
    state, metrics = run(problem, start.detach(), phi, batches[:cut])
    theta = tree.leaves(state.params)
    state = replace(state, params=theta)
    if steps:
        state, metrics = run(problem, state, outer, batches[cut:], create_graph=True, taken=cut)
    value = problem.outer_loss(state.params, outer, episode.outer, state.buffers)
    d, c = gradients(value, {name: theta[name] for name in through_start}, outer)
    grads = tree.add(c, vector_jacobian(through_start, outer, d))
    return Hypergradient(value.detach(), grads, state.detach(), metrics)
