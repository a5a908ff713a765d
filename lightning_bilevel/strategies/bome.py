"""Dynamic barrier descent: θ and φ go down f together, as far as the value gap g(θ) − min g still closes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner import InnerEvaluation, inner_value_and_grads
from lightning_bilevel.calculus.outer import outer_value, outer_value_and_grads
from lightning_bilevel.calculus.runs import run
from lightning_bilevel.errors import MisconfigurationError, number, one_of
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.value_gap import checked_outer_loss, refusals_of_joint_steps
from lightning_bilevel.tree import Params

Barrier = Literal["gradient", "gap"]


class BOME(HypergradientStrategy):
    r"""ĝ = ∂_φ f + λ ∂_φ q with q = g(θ, φ) − g(θ^(T), φ), and θ ← θ − ξ (∂_θ f + λ ∂_θ q), all at the old θ.

    θ^(T) is the end of T inner steps from θ, a constant in q. λ is the least weight for which q goes down as fast as a
    barrier κ asks, with ∇ by θ and φ together::

        λ = max(0, (κ − ⟨∇f, ∇q⟩) / ‖∇q‖²),    κ = η ‖∇q‖²  ("gradient"),    κ = η q  ("gap", that of the authors' code)

    g is the mean over the batches of the run of the inner loss, with the weight decay of the inner optimizer and, under
    ``maximize``, the other sign (see :meth:`BilevelProblem.stationary`). Steps to θ^(T) are those of the inner
    optimizer, from a fresh state; the step of θ is plain descent at the rate ξ. φ is moved by the outer optimizer: the
    barrier is derived for plain descent with ξ there, too. λ is logged as ``barrier_weight``, q as ``value_gap``.

    Biased for ∇h at every step, since θ is no minimum of g: what moves is (θ, φ), towards points where f cannot fall
    without g rising, fixed points of :class:`PenaltyGradient` at that λ. Where f and g agree λ is 0, and φ that acts
    through g only stays as it is. Memory: O(M + N). Cost: T steps, one gradient of f, two of g for each batch; no
    second derivatives. The value is f at the new θ.

    Needs ``inner_start="warm"``, no shared parameters, one episode a batch.

    Source: Ye, Liu et al., NeurIPS 2022, arXiv 2209.08709, Algorithm 1 and eq. 4–5.

    Args:
        lr: ξ, the step of θ.
        eta: η, how fast the gap closes.
        barrier: ``"gradient"`` or ``"gap"``.

    Raises:
        ValueError: a bad argument.

    >>> BOME(lr=0.05, eta=0.2).barrier
    'gradient'
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    needs_steps = True
    memory = "O(M + N)"
    cost = "T steps + 1 outer and 2 inner gradients"
    supports_stacking = False

    def __init__(self, lr: float = 0.01, eta: float = 0.5, barrier: Barrier = "gradient") -> None:
        self.lr = number("BOME(lr=...)", lr, above=0)
        self.eta = number("BOME(eta=...)", eta, above=0)
        self.barrier: Barrier = one_of("BOME(barrier=...)", Barrier, barrier)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return ĝ, and θ after its step; see :meth:`HypergradientStrategy.estimate`."""
        batches, start = problem.batches(episode), problem.start(carry.inner, phi)
        masks = RngState(tree.device(phi))

        def inner(state: InnerState, by_theta: bool) -> InnerEvaluation:
            masks.restore()
            return inner_value_and_grads(problem.stationary(), state, phi, batches, by_theta)

        fresh = replace(start, opt_state=problem.init_opt_state(start.params, phi), steps=0)
        trained, metrics = run(problem, fresh, phi, batches)
        at_theta, at_end = inner(start, True), inner(trained, False)
        before, d, c, _ = outer_value_and_grads(problem, start, phi, episode)
        checked_outer_loss(before)
        gap, by_phi = at_theta.value - at_end.value, tree.sub(at_theta.c, at_end.c)
        weight = self._weight(gap, tree.dot(d, at_theta.d) + tree.dot(c, by_phi), at_theta.d, by_phi)
        moved = tree.add(start.params, tree.add(d, tree.scale(at_theta.d, weight)), alpha=-self.lr)
        after = InnerState(moved, trained.buffers, start.opt_state, start.steps + 1)
        value, observed = outer_value(problem, after, phi, episode)
        metrics = {**metrics, "barrier_weight": weight, "value_gap": gap}
        return Hypergradient(value, tree.add(c, tree.scale(by_phi, weight)), after, metrics, observed=observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what a joint step cannot work with in ``problem``."""
        return refusals_of_joint_steps(problem, "BOME")

    def _weight(self, gap: Tensor, along: Tensor, by_theta: Params, by_phi: Params) -> Tensor:
        """Return λ from q, ⟨∇f, ∇q⟩ and both parts of ∇q."""
        square = tree.dot(by_theta, by_theta) + tree.dot(by_phi, by_phi)
        barrier = self.eta * (square if self.barrier == "gradient" else gap)
        return ((barrier - along) / square.clamp_min(torch.finfo(square.dtype).tiny)).clamp_min(0)
