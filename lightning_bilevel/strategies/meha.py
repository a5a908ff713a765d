"""The Moreau envelope of the inner loss in place of its minimum: a single loop for inner losses with several minima."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner import InnerEvaluation, inner_value_and_grads
from lightning_bilevel.calculus.outer import outer_value, outer_value_and_grads
from lightning_bilevel.calculus.runs import last_loss
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import MisconfigurationError, number
from lightning_bilevel.problem import Batch, BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.penalty_gradient import with_outer_loss
from lightning_bilevel.strategies.value_gap import checked_outer_loss, refusals_of_joint_steps
from lightning_bilevel.tree import Params


class MEHA(HypergradientStrategy):
    r"""ĝ = ∂_φ f(θ) + c_k (∂_φ g(θ) − ∂_φ g(ω)), with ω on its way to argmin_ω g(ω) + ‖ω − θ‖²/2γ.

    An outer step k = 0, 1, … is one inner step for ω and one for θ, both by the inner optimizer, each with a state of
    its own; ĝ is taken at the old θ and the new ω::

        ω ← a step on g(ω, φ) + ‖ω − θ‖²/2γ
        θ ← a step on g(θ, φ) + f(θ, φ)/c_k − ‖θ − ω‖²/2γ        c_k = c₀ (k + 1)^p

    The value gap g(θ) − min g of :class:`PenaltyGradient` is replaced by g less its Moreau envelope, whose minimum is
    unique for γ below 1 over the weak convexity of g, also where g has several minima.

    Biased at every step; tracks ∇h as ω and θ converge and c_k grows: for a fixed φ and c_k, on a quadratic g with
    Hessian A and an f with Hessian S, to c + d P (A P + S/c_k)⁻¹ Bᵀ with P = A (A + I/γ)⁻¹. ĝ is c_k times the paper's,
    so that its scale is that of ∇h. Memory: 2 states of θ, O(M + N). Cost: 2 inner steps, 1 outer gradient, 2 by φ; no
    second derivatives. The value is f at the new θ. Slow where 1/γ is large: the rate of ω has to suit L + 1/γ.

    Needs ``inner_start="warm"``, ``inner_steps=1``, no shared parameters, one episode a batch.

    Source: MEHA, Liu et al., ICML 2024, arXiv 2405.09927, Algorithm 1; there φ is moved before θ.

    Args:
        gamma: γ.
        penalty: c₀.
        power: p in [0, ½).

    Raises:
        ValueError: a bad argument.

    >>> MEHA(gamma=2.0).power
    0.25
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    needs_steps = True
    memory = "O(M + N)"
    cost = "2 steps + 1 outer gradient + 2 gradients by φ"
    supports_stacking = False

    def __init__(self, gamma: float = 1.0, penalty: float = 10.0, power: float = 0.25) -> None:
        self.gamma = number("MEHA(gamma=...)", gamma, above=0)
        self.penalty = number("MEHA(penalty=...)", penalty, above=0)
        self.power = number("MEHA(power=...)", power, at_least=0, at_most=0.5)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return ĝ, and θ after its step; see :meth:`HypergradientStrategy.estimate`.

        Carried: ω with its optimizer state, and k.
        """
        k = int(carry.strategy["k"]["k"]) if carry.strategy else 0
        batch, weight = episode.inner[0], self.penalty * (k + 1) ** self.power
        theta = problem.start(carry.inner, phi)
        fresh = replace(theta, opt_state=problem.init_opt_state(theta.params, phi))
        omega = fresh.unflat(carry.strategy["omega"]) if carry.strategy else fresh
        masks = RngState(tree.device(phi))

        def step(state: InnerState, loss: BilevelProblem) -> InnerState:
            masks.restore()
            return inner_step(loss)(state, phi, batch)[0]

        def inner(state: InnerState) -> InnerEvaluation:
            masks.restore()
            return inner_value_and_grads(problem.stationary(), state, phi, [batch], by_theta=False)

        omega = step(omega, _pulled(problem, theta.params, 1 / self.gamma))
        before, _, c, _ = outer_value_and_grads(problem, theta, phi, episode)
        checked_outer_loss(before)
        at_theta, at_omega = inner(theta), inner(omega)
        grads = tree.add(c, tree.sub(at_theta.c, at_omega.c), alpha=weight)
        both = with_outer_loss(problem, episode, torch.tensor(1 / weight, dtype=torch.float64))
        after = step(theta, _pulled(both, omega.params, -1 / self.gamma))
        value, observed = outer_value(problem, after, phi, episode)
        metrics = last_loss(problem, [at_theta.value])
        kept = {"k": {"k": torch.tensor(k + 1)}, "omega": tree.map(torch.clone, omega.flat())}
        return Hypergradient(value, grads, after, metrics, kept, observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what a joint step cannot work with in ``problem``."""
        return refusals_of_joint_steps(problem, "MEHA", one_step=True)


def _pulled(problem: BilevelProblem, to: Params, strength: float) -> BilevelProblem:
    """Return the problem whose steps minimize ``strength``/2 ‖θ − to‖² besides what they did."""
    strength = -strength if problem.maximize else strength

    def inner_loss(theta: Params, phi: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        loss, after = problem.inner_loss(theta, phi, batch, buffers)
        for name, value in theta.items():
            distance = (value - to[name]).abs().square().sum()
            loss = loss + 0.5 * strength * distance
        return loss, after

    return replace(problem, inner_loss=inner_loss)
