"""Hypergradient that weighs every inner step's direct effect by a discount."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import append_loss
from lightning_bilevel.calculus.outer import outer_value_and_grads, outer_weights
from lightning_bilevel.calculus.runs import last_loss, vector_jacobian
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import number
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
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

    With ``outer_loss_weights`` it is Σ_t w_t times the estimate for f(θ_t), from the same sums.

    A user's ``solve_inner`` is one step: there the estimate is exact for a differentiable one.

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
    differentiates = frozenset({"run"})
    memory = "O(M + N)"
    cost = "T steps + T outer gradients + T mixed products"
    weighs_steps = True

    def __init__(self, gamma: float = 0.99) -> None:
        self.gamma = number("GammaGreedy(gamma=...)", gamma, at_least=0, at_most=1)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the discounted sum; see :meth:`HypergradientStrategy.estimate`."""
        outer, device = tree.leaves(phi), tree.device(phi)
        judged = None if problem.outer_loss_weights is None else _Judged(problem, outer)
        problem = problem.judged_at_the_end()
        step = inner_step(problem)
        start = problem.start(carry.inner, outer)
        state, total = start.detach(), tree.zeros_like(phi)
        losses: list[Tensor] = []
        rng = RngState(device)
        if any(value.requires_grad for value in start.params.values()):
            total = vector_jacobian(start.params, outer, outer_value_and_grads(problem, state, phi, episode).d)
        batches, unobserved = problem.batches(episode), replace(problem, observer=None)
        for taken, batch in enumerate(batches, start=1):
            rng.restore()  # the masks of earlier outer losses leave no trace: θ_T is that of a plain run
            state, loss, pull = step.vjp(state, phi, [batch])
            rng = RngState(device)
            judged_by = problem if taken == len(batches) else unobserved  # what counts is left behind at θ_T
            value, d, c, observed = outer_value_and_grads(judged_by, state, phi, episode)
            _, through = pull(d, ())
            total = tree.add(through, total, alpha=self.gamma)
            append_loss(losses, *loss)
            if judged is not None:
                judged.add(value, tree.add(c, total))
        value, grads = (value, tree.add(c, total)) if judged is None else judged.end()
        return Hypergradient(value, grads, state, last_loss(problem, losses), observed=observed)


class _Judged:
    """Σ_t w_t(φ) f(θ_t), and Σ_t w_t ĝ_t + Σ_t f(θ_t) ∂w_t/∂φ from estimates ĝ_t for the f(θ_t)."""

    def __init__(self, problem: BilevelProblem, outer: Params) -> None:
        self._problem, self._outer = problem, outer
        self._weights = outer_weights(problem, outer)
        self._values: list[Tensor] = []
        self._grads = tree.zeros_like(tree.detach(outer))

    def add(self, value: Tensor, grads: Params) -> None:
        """Count the next step."""
        weight = self._problem.weighed(self._weights.detach(), len(self._values))
        self._values.append(value)
        self._grads = tree.add(self._grads, grads, alpha=weight.to(value))

    def end(self) -> tuple[Tensor, Params]:
        """Return both sums."""
        with torch.enable_grad():
            weighed = (self._problem.weighed(self._weights, t).to(f) * f for t, f in enumerate(self._values))
            total = torch.stack(list(weighed)).sum()
        own = vector_jacobian({"total": total}, self._outer, {"total": torch.ones_like(total)})
        return total.detach(), tree.add(self._grads, own)
