"""The conjugate gradient method."""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import integer, number
from lightning_bilevel.linear_solvers._common import WarnsOnce, flat_system
from lightning_bilevel.linear_solvers.base import LinearSolver, MatVec, Solution
from lightning_bilevel.tree import Params


class ConjugateGradient(WarnsOnce, LinearSolver):
    r"""Solve (A + λI) x = b by conjugate gradients from x = 0.

    .. math:: x_k = \arg\min_{x \in \mathcal{K}_k} \tfrac12 x^\top (A + \lambda I) x - b^\top x,
              \qquad \mathcal{K}_k = \mathrm{span}\{b, Ab, \dots, A^{k-1} b\}

    Exact in M products up to rounding, and ‖x − x_k‖ falls like ((√κ − 1)/(√κ + 1))ᵏ in the norm of A + λI with
    condition number κ. Damping λ biases x towards b/λ. It stops at ‖b − (A + λI) x‖ ≤ tol ‖b‖, by the
    residual of the recurrence. Memory O(M); one product and one device synchronisation an iteration:
    stopping early saves products, which cost more.

    Assumes that A + λI is positive definite. If pᵀ(A + λI)p ≤ 0 along a direction p it stops at the iterate
    before, which is 0 if b itself is such a direction, and says so. A Hessian away from the inner optimum,
    or of a network at any point, often needs ``damping`` above its most negative eigenvalue. Products with a
    noisy A (a new batch or dropout mask in each) break the recurrence: use
    :class:`~lightning_bilevel.linear_solvers.Neumann`.

    Paper: Hestenes and Stiefel (1952); Pedregosa (2016), Hyperparameter optimization with approximate gradient,
    and Rajeswaran et al. (2019), iMAML, for its use here.

    Args:
        max_iter: the most products a solve may take.
        tol: relative residual at which to stop.
        damping: λ, added to the diagonal.

    Raises:
        ValueError: ``max_iter`` is not a positive integer, ``tol`` not positive or ``damping`` negative.

    >>> import torch
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> solution = ConjugateGradient().solve(lambda v: {"w": matrix @ v["w"]}, {"w": torch.tensor([3.0, 3.0])})
    >>> solution.value["w"].round(decimals=4), solution.converged, solution.iterations
    (tensor([1., 1.]), True, 1)
    """

    def __init__(self, max_iter: int = 20, tol: float = 1e-6, damping: float = 0.0) -> None:
        self.max_iter = integer("ConjugateGradient(max_iter=...)", max_iter)
        self.tol = number("ConjugateGradient(tol=...)", tol, above=0)
        self.damping = number("ConjugateGradient(damping=...)", damping, at_least=0)

    @override
    def solve(self, matvec: MatVec, b: Params) -> Solution:
        """Return the first iterate that meets the tolerance, or the last good one with ``converged=False``.

        The residual is that of A + λI. Products that are nan make the value nan, for the caller to see.

        Args:
            matvec: v ↦ A v.
            b: the right-hand side.
        """
        apply, flat = flat_system(matvec, b)
        length = torch.linalg.vector_norm(flat).clamp_min(torch.finfo(flat.dtype).tiny)
        r = p = flat / length  # residuals are relative, and their squares do not underflow
        x = torch.zeros_like(r)
        square, products, curvature = r.dot(r), 0, 1.0
        size = square.item()
        while not size <= self.tol**2 and math.isfinite(size) and products < self.max_iter:
            image = apply(p) + self.damping * p
            products += 1
            slope = p.dot(image)
            step = square / slope
            next_r = r - step * image
            next_square = next_r.dot(next_r)
            curvature, next_size = torch.stack([slope, next_square]).tolist()
            if curvature <= 0:
                break
            x, r, p = x + step * p, next_r, next_r + (next_square / square) * p
            square, size = next_square, next_size
        converged = size <= self.tol**2
        if not converged:
            self._warn(f"`ConjugateGradient(max_iter={self.max_iter})` {self._reason(size, curvature)}")
        return Solution(tree.unflatten(length * x, b), converged, products, square.sqrt())

    def _reason(self, size: float, curvature: float) -> str:
        if curvature <= 0:
            return (
                f"stopped at a direction of curvature {curvature:.3g}: the inner Hessian is not positive definite. "
                f"Raise `damping`, now {self.damping}, above its most negative eigenvalue."
            )
        if not math.isfinite(size):
            return "met products that are nan or infinite. Look at the inner loss and at its second derivatives."
        return (
            f"reached a relative residual of {math.sqrt(size):.3g}, not `tol={self.tol}`. "
            "Raise `max_iter`, `tol` or `damping`."
        )
