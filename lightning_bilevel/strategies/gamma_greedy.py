"""Hypergradient that weighs every inner step's direct effect by a discount."""

from __future__ import annotations

from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import outer_gradients
from lightning_bilevel.calculus.inner_loop import last_loss, note, vector_jacobian
from lightning_bilevel.errors import number
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.tree import Params


class GammaGreedy(HypergradientStrategy):
    r"""ĝ = c + Σ_t γ^{T−t} ∇_θ f(θ_t) B_t, accumulated while the inner run goes: s ← γ s + ∇_θ f(θ_t) B_t.

    B_t = ∂Ω_t/∂φ at a fixed optimizer state; c = ∂f/∂φ enters once, at the end. Every step is judged
    by the outer loss right after it, so nothing is propagated backward through the run.

    Biased; a descent direction for gradient descent on a strongly convex g at suitable γ (Theorem 4.6: inner Hessian
    I, γ = 1 − η). Its length depends on γ and on the inner optimizer's momentum, so an outer optimizer that
    adapts its scale (Adam) suits it. γ → 0 is ``TruncatedReverse(1)``. Where the start Ω_0 depends on φ the term
    γ^T ∇f(θ_0) ∂Ω_0/∂φ is added.

    Memory: O(M + N), flat in T. Cost: T inner steps, T outer gradients, T mixed products.

    Not with a user's ``solve_inner``, which has no steps.

    Source: generalised greedy (γ-greedy), eq. 6–7, Theorem 4.6.

    Args:
        gamma: γ in [0, 1].

    Raises:
        ValueError: ``gamma`` is not in [0, 1].

    >>> GammaGreedy(gamma=0.9).gamma
    0.9
    """

    exact = False
    unbiased = False
    requires = "step"
    second_order = True
    memory = "O(M + N)"
    cost = "T steps + T outer gradients + T mixed products"

    def __init__(self, gamma: float = 0.99) -> None:
        self.gamma = number("GammaGreedy(gamma=...)", gamma, at_least=0, at_most=1)

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the discounted sum; see :meth:`HypergradientStrategy.estimate`."""
        outer = tree.leaves(phi)
        losses: list[Tensor] = []
        start = problem.start(memory, outer)
        state, total = start.detach(), tree.zeros_like(phi)
        device = next(iter(phi.values())).device
        randomness = RngState(device)
        if any(value.requires_grad for value in start.params.values()):
            _, d, _ = outer_gradients(problem, state, phi, episode)
            total = vector_jacobian(start.params, outer, d)
        for batch in problem.batches(episode):
            randomness.restore()  # the masks of earlier outer losses leave no trace: θ_T is that of a plain run
            stepped, loss = problem.step(state, outer, batch, create_graph=True)
            randomness, state = RngState(device), stepped.detach()
            value, d, c = outer_gradients(problem, state, phi, episode)
            total = tree.add(vector_jacobian(stepped.params, outer, d), total, alpha=self.gamma)
            note(losses, loss)
        return Hypergradient(value, tree.add(c, total), state, last_loss(problem, losses))
