"""The truncated Neumann series."""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import integer, number
from lightning_bilevel.linear_solvers._common import WarnsOnce, flat_system
from lightning_bilevel.linear_solvers.base import LinearSolver, MatVec, Solution
from lightning_bilevel.tree import Params


class Neumann(WarnsOnce, LinearSolver):
    r"""Sum K terms of the Neumann series of (αA)⁻¹.

    .. math:: x = \alpha \sum_{k=0}^{K-1} (I - \alpha A)^k b

    Biased: A x = b − (I − αA)ᴷ b, so ‖b − A x‖ ≤ max_i abs(1 − αλ_i)ᴷ ‖b‖. It converges to A⁻¹b if and only
    if A is positive definite and 0 < α < 2/λ_max; where A has a negative eigenvalue it diverges for every α.
    K terms take K − 1 products, and memory is O(M), flat in K. With α the inner learning rate it equals
    back-propagation through K steps of gradient descent at the optimum (AID-FP); K = 1 is ``Identity(scale=α)``.

    Divergence is noticed at the end, with one device synchronisation a solve. The norm of (I − αA)ᵏ b is
    log-convex in k for symmetric A, so a series that diverges shows it in the ratio of its last two terms, and
    a ratio above 1 proves that α or A is outside the assumption. The line is 1.01, so that rounding and noisy
    products stay below it, or 1 + 1/K for K > 100, where another K terms would grow by about e.

    Use it when λ_max is known or the inner loop is gradient descent. Not for ill-conditioned A, where K must
    be of the order of λ_max/λ_min: :class:`~lightning_bilevel.linear_solvers.ConjugateGradient` needs its root.

    Paper: Lorraine, Vicol and Duvenaud (2020), Optimizing Millions of Hyperparameters by Implicit
    Differentiation; eq. 3 of FSLA (Li et al. 2022, arXiv 2112.04660), where the number of terms is right.

    Args:
        terms: K, how many terms.
        step_size: α, below 2/λ_max; the learning rate of an inner loop that converges is.

    Raises:
        ValueError: ``terms`` is not a positive integer or ``step_size`` not a positive number.

    >>> import torch
    >>> solution = Neumann(terms=3, step_size=0.25).solve(lambda v: {"w": 2 * v["w"]}, {"w": torch.tensor([8.0])})
    >>> solution.value, solution.iterations  # 2 · (1 + 1/2 + 1/4) on the way to 4
    ({'w': tensor([3.5000])}, 2)
    """

    blockwise = True

    def __init__(self, terms: int = 10, *, step_size: float) -> None:
        self.terms = integer("Neumann(terms=...)", terms)
        self.step_size = number("Neumann(step_size=...)", step_size, above=0)

    @override
    def solve(self, matvec: MatVec, b: Params) -> Solution:
        """Return the sum of the first K terms, with ``converged=False`` if they grow and ``None`` otherwise.

        Args:
            matvec: v ↦ A v.
            b: the right-hand side.
        """
        apply, term = flat_system(matvec, b)
        before = total = term
        for _ in range(self.terms - 1):
            before = term  # of the same tensor, so that a product never meets two terms
            term = term - self.step_size * apply(term)
            total = total + term
        last, previous, cosine = torch.stack([term.norm(), before.norm(), term.dot(before)]).tolist()
        diverges = not math.isfinite(last) or last > previous * (1 + min(0.01, 1 / self.terms))
        if diverges:
            self._warn(f"`Neumann(step_size={self.step_size})` diverges: {_reason(last, previous, cosine)}")
        value = tree.unflatten(self.step_size * total, b)
        return Solution(value, False if diverges else None, self.terms - 1, None)


def _reason(last: float, previous: float, cosine: float) -> str:
    if not math.isfinite(last):
        return "its terms are nan or infinite. Lower `step_size`, and look at the inner loss."
    grows = f"its last term has {last / previous:.3g} times the norm of the one before and"
    if cosine < 0:
        return f"{grows} the other sign. Lower `step_size` below 2/λ_max."
    return (
        f"{grows} the same sign, so the inner Hessian has a negative eigenvalue and no `step_size` converges. "
        "Train the inner problem further, or use `ConjugateGradient(damping=...)`."
    )
