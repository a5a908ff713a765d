"""The last inner step, differentiated by finite differences of first derivatives."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner import inner_value_and_grads
from lightning_bilevel.calculus.outer import outer_value_and_grads
from lightning_bilevel.calculus.runs import last_loss, vector_jacobian
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import number
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.tree import Params


class DARTS(HypergradientStrategy):
    r"""ĝ = c + [∂_φ g(w + εu) − ∂_φ g(w − εu)] / 2ε + d ∂U/∂φ, with u = d ∂U/∂(∇g) and ε = r/‖u‖.

    w = θ_{T−1} is where the last step begins, θ_T = U(w, ∇g, φ) what the inner optimizer's rule makes of it; d = ∂f/∂θ
    and c = ∂f/∂φ at θ_T. For gradient descent u = −ηd. It is ``TruncatedReverse(steps=1)``, whose second derivatives
    are replaced by a central difference: exact where g is quadratic in θ, else off by O(r²). With ``inner_steps=1`` it
    is the second-order approximation of DARTS. Where the start Ω_0 depends on φ (parameters shared by both levels) the
    difference of ∂_θ g takes the place of the Hessian product, too.

    Biased as ``TruncatedReverse(1)`` is. Memory: O(M + N). Cost: T steps, one outer gradient, two gradients by φ; no
    second derivatives of the losses. Rounding is magnified by 1/r.

    Source: Liu, Simonyan and Yang, ICLR 2019, arXiv 1806.09055, eq. 7–8; survey, arXiv 2207.11719, eq. 53.

    Args:
        radius: r, how far w is moved, in the units of θ.

    Raises:
        ValueError: ``radius`` is not a positive number.

    >>> DARTS(radius=0.01).differentiates
    frozenset()
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    needs_steps = True
    memory = "O(M + N)"
    cost = "T steps + 1 outer gradient + 2 gradients by φ"
    supports_stacking = False

    def __init__(self, radius: float = 1e-2) -> None:
        self.radius = number("DARTS(radius=...)", radius, above=0)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the gradient through the last step; see :meth:`HypergradientStrategy.estimate`."""
        *batches, batch = problem.batches(episode)
        outer = tree.leaves(phi)
        start = problem.start(carry.inner, outer)
        step = inner_step(problem)
        before, losses = step.run(start.detach(), phi, batches)
        masks = RngState(tree.device(phi))
        after, loss, pull = step.rule(before, phi, batch)
        metrics = last_loss(problem, [*losses, loss])
        value, d, c, observed = outer_value_and_grads(problem, after, phi, episode)
        u, by_theta, by_phi = pull(d)
        moving = {name: p for name, p in start.params.items() if p.requires_grad}
        length = tree.norm(u)
        scale = self.radius / length.clamp_min(torch.finfo(length.dtype).tiny)

        def slopes(sign: float) -> tuple[Params, Params]:
            masks.restore()
            moved = replace(before, params=tree.add(before.params, u, alpha=sign * scale))
            _, by_theta, by_phi = inner_value_and_grads(problem, moved, phi, [batch], by_theta=bool(moving))
            return by_theta, by_phi

        with RngState(tree.device(phi)).fork():
            ahead, behind = slopes(1.0), slopes(-1.0)
        hessian, mixed = (tree.scale(tree.sub(a, b), 0.5 / scale) for a, b in zip(ahead, behind, strict=True))
        grads = tree.add(tree.add(c, by_phi), mixed)
        if moving:
            grads = tree.add(grads, vector_jacobian(moving, outer, tree.add(by_theta, hessian)))
        return Hypergradient(value, grads, after, metrics, observed=observed)
