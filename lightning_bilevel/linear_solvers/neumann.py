"""The truncated Neumann series."""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import integer, number
from lightning_bilevel.linear_solvers._common import normalized, same, start, warn_once
from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, Solution
from lightning_bilevel.tree import Params

GROWTH = 0.01
"""By how much terms may grow before a series counts as divergent: rounding and noisy products stay below it.

For K > 100 terms it is 1/K, at which another K terms would grow by about e. It holds for the last term over the one
before where A is symmetric and there is no P: ‖(I − αA)ᵏ r₀‖ is log-convex in k then, so that a series that diverges
grows at its end, and one that grows anywhere diverges. Otherwise a convergent series may grow for a while, so that its
last term is compared with the first: where it is larger, the residual of x is no better than that of x₀.
"""


class Neumann(LinearSolver):
    r"""Sum K terms of the Neumann series of (αA)⁻¹: K steps of Richardson's iteration from x₀.

    .. math:: x = x_0 + \alpha P \sum_{k=0}^{K-1} (I - \alpha A P)^k r_0, \qquad r_0 = b - A x_0

    with x₀ = 0 and P = I where the system has none. Biased: b − A x = (I − αAP)ᴷ r₀, so that
    ‖b − A x‖ ≤ max_i abs(1 − αλ_i)ᴷ ‖r₀‖ for symmetric A and P = I. It converges to A⁻¹b for every b if and only if the
    eigenvalues λ of AP have abs(1 − αλ) < 1: real ones are positive and below 2/α. So α is near 1 with a good P, and
    for the system of a fixed point, A = (I − ∂Ω/∂θ)ᵀ, where the terms are powers of (∂Ω/∂θ)ᵀ. Where a symmetric A
    has a negative eigenvalue it diverges for every α.

    K terms take K − 1 products, K from an x₀, and memory is O(M), flat in K. With α the inner learning rate it equals
    back-propagation through K steps of gradient descent at the optimum (AID-FP); K = 1 is ``Identity(scale=α)``.
    Divergence is noticed at the end, with one device synchronization a solve.

    Use it when λ_max is known or the inner loop is gradient descent. Not for ill-conditioned A, where K must
    be of the order of λ_max/λ_min: :class:`~lightning_bilevel.linear_solvers.ConjugateGradient` needs its root.

    Paper: Lorraine, Vicol and Duvenaud (2020), Optimizing Millions of Hyperparameters by Implicit
    Differentiation; eq. 3 of FSLA (Li et al. 2022, arXiv 2112.04660), where the number of terms is right.

    Args:
        terms: K, how many terms; from an x₀, how many further ones.
        step_size: α, below 2/λ_max; the learning rate of an inner loop that converges is.

    Raises:
        ValueError: ``terms`` is not a positive integer or ``step_size`` not a positive number.

    >>> import torch
    >>> system = LinearSystem(lambda v: {"w": 2 * v["w"]}, {"w": torch.tensor([8.0])})
    >>> solution = Neumann(terms=3, step_size=0.25).solve(system)
    >>> solution.value, solution.iterations  # 2 · (1 + 1/2 + 1/4) on the way to 4
    ({'w': tensor([3.5000])}, 2)
    """

    supports_stacking = True

    def __init__(self, terms: int = 10, *, step_size: float) -> None:
        self.terms = integer("Neumann(terms=...)", terms)
        self.step_size = number("Neumann(step_size=...)", step_size, above=0)

    @override
    def solve(self, system: LinearSystem) -> Solution:
        """Return x after K terms, with ``converged=False`` if they grow and ``None`` otherwise."""
        unit, restored = normalized(system)
        precondition = unit.precondition or same
        x, first, products = start(unit)
        total, term, before = self._terms(unit, first)
        log_convex = unit.symmetric and unit.precondition is None  # see GROWTH
        other = before if log_convex else first
        pairs = (term, term), (other, other), (term, other)
        last, earlier, cosine = torch.stack([unit.dot(u, v) for u, v in pairs]).tolist()
        diverges = not math.isfinite(last) or last > earlier * (1 + min(GROWTH, 1 / self.terms)) ** 2
        if diverges:
            reason = _reason(last, earlier, cosine, log_convex)
            warn_once(self, f"`Neumann(step_size={self.step_size})` diverges: {reason}")
        value = restored(tree.add(x, precondition(total), alpha=self.step_size))
        return Solution(value, False if diverges else None, products + self.terms - 1, None)

    def _terms(self, system: LinearSystem, first: Params) -> tuple[Params, Params, Params]:
        """Return the sum of the terms, the last one and the one before."""
        if system.series is not None and system.precondition is None:
            found = system.series(first, self.terms, self.step_size)
            if found is not None:
                return found
        precondition = system.precondition or same
        total = before = term = first
        for _ in range(self.terms - 1):
            before = term
            term = tree.add(term, system.matvec(precondition(term)), alpha=-self.step_size)
            total = tree.add(total, term)
        return total, term, before


def _reason(last: float, earlier: float, cosine: float, log_convex: bool) -> str:
    """Say why it diverges, from ‖·‖² of the last term and of the one it is compared with, and their product."""
    if not math.isfinite(last):
        return "its terms are nan or infinite. Lower `step_size`, and look at the inner loss."
    grows = f"its last term has {math.sqrt(last / earlier):.3g} times the norm of the"
    if not log_convex:
        return f"{grows} first. Lower `step_size`, or raise `terms` if they fall later."
    if cosine < 0:
        return f"{grows} one before and the other sign. Lower `step_size` below 2/λ_max."
    return (
        f"{grows} one before and the same sign, so the inner Hessian has a negative eigenvalue and no `step_size` "
        "converges. Train the inner problem further, or use `ConjugateGradient(damping=...)`."
    )
