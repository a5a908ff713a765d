"""Hypergradient through the last inner steps only."""

from __future__ import annotations

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import outer_value_and_grads
from lightning_bilevel.calculus.runs import last_loss, vector_jacobian
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import integer
from lightning_bilevel.problem import TOTAL, BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.tree import Params


class TruncatedReverse(HypergradientStrategy):
    r"""ĝ = c_T + Σ_{t > T-K} d_T A_T ⋯ A_{t+1} B_t: the reverse recursion stopped after K steps.

    Biased: for a strongly convex g (modulus α) and gradient descent at rate η the error is at most
    (1−ηα)^K / (ηα) · ‖d_T‖ max‖B_t‖. ``steps >= T`` is exact. Where the start Ω_0 depends on φ (parameters shared by
    both levels), d_{T-K} ∂Ω_0/∂φ is added: the steps before the cut count as the identity, as in first-order MAML.

    Memory: the activations of K inner steps. Cost: T steps and K second-order backward steps.

    With ``outer_loss_weights`` the outer losses before the cut count too, each by ∂f/∂φ and the shared parameters.

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
    differentiates = frozenset({"run"})
    memory = "O(K) activations"
    cost = "T steps + K second-order backward steps"
    weighs_steps = True

    def __init__(self, steps: int = 1) -> None:
        self.steps = integer("TruncatedReverse(steps=...)", steps)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the truncated hypergradient; see :meth:`HypergradientStrategy.estimate`."""
        return truncated(problem, carry.inner, phi, episode, self.steps)


def truncated(problem: BilevelProblem, carried: InnerState, phi: Params, episode: Episode, last: int) -> Hypergradient:
    """Run T - ``last`` inner steps without a graph and the rest with one; differentiate the rest.

    ``last`` of at least T is the whole run. What depends on φ at the start is differentiated in any case.
    """
    step, batches = inner_step(problem), problem.batches(episode)
    cut = max(0, len(batches) - last)
    outer = tree.leaves(phi)
    start = problem.start(carried, outer)
    head = step.held(start.detach(), phi, batches[:cut])
    state, metrics = head.state, last_loss(problem, head.losses)
    grads = tree.zeros_like(phi)
    moving = {name: value for name, value in start.flat().items() if value.requires_grad}
    if cut:  # parameters only: the optimizer's state at the cut is no function of the start
        moving = {name: value for name, value in moving.items() if name in start.params}
    pulled = step.vjp(state, phi, batches[cut:]) if last else None
    if pulled is not None:
        state, metrics = pulled.state, last_loss(problem, pulled.losses, taken=cut)
    value, d, c, observed = outer_value_and_grads(problem, state, phi, episode)
    if pulled is not None:
        d, grads = pulled.pull(d, {*moving, TOTAL})
    d, through = head.pull(d, moving)
    grads = tree.add(tree.add(tree.add(c, grads), through), vector_jacobian(moving, outer, d))
    return Hypergradient(value, grads, state, metrics, observed=observed)
