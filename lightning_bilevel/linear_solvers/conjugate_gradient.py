"""The conjugate gradient method."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import integer, number, value_error
from lightning_bilevel.linear_solvers._common import normalized, same, start, warn_once
from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, MatVec, Solution
from lightning_bilevel.tree import Params


class ConjugateGradient(LinearSolver):
    r"""Solve A_λ x = b, A_λ = A + λI, by conjugate gradients from x₀, preconditioned by P.

    .. math:: x_k = \arg\min_{x \in x_0 + \mathcal{K}_k} \tfrac12 x^\top A_\lambda x - b^\top x,
              \qquad \mathcal{K}_k = \mathrm{span}\{P r_0, (P A_\lambda) P r_0, \dots, (P A_\lambda)^{k-1} P r_0\}

    with r₀ = b − A_λ x₀; x₀ = 0 and P = I where the system has none. Exact in M products up to rounding, and
    ‖x − x_k‖ falls like ((√κ − 1)/(√κ + 1))ᵏ in the norm of A_λ, with κ the condition number of P A_λ. Damping λ biases
    x towards b/λ. It stops at ‖b − A_λ x‖ ≤ tol ‖b‖, by the residual of the recurrence. Memory O(M); one product
    and one device synchronization an iteration, and a product for x₀: stopping early saves products, which cost more.

    Assumes that A_λ and P are positive definite. If pᵀ A_λ p ≤ 0 along a direction p it stops at the iterate before,
    which is x₀ if P r₀ is such a direction, and says so. A Hessian away from the inner optimum, or of a network at any
    point, often needs ``damping`` above its most negative eigenvalue. Products with a noisy A (a new batch or
    dropout mask in each) break the recurrence: use :class:`~lightning_bilevel.linear_solvers.Neumann`.

    Paper: Hestenes and Stiefel (1952); Pedregosa (2016), Hyperparameter optimization with approximate gradient,
    and Rajeswaran et al. (2019), iMAML, for its use here.

    Args:
        max_iter: the most products a solve may take, that for x₀ included.
        tol: relative residual at which to stop.
        damping: λ, added to the diagonal.
        preconditioner: makes P of the inner loss, such as :class:`~lightning_bilevel.linear_solvers.KFAC`; ``None``:
            P is that of the system.

    Raises:
        ValueError: ``max_iter`` is not a positive integer, ``tol`` not positive or ``damping`` negative.

    >>> import torch
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> system = LinearSystem(lambda v: {"w": matrix @ v["w"]}, {"w": torch.tensor([3.0, 3.0])})
    >>> solution = ConjugateGradient().solve(system)
    >>> solution.value["w"].round(decimals=4), solution.converged, solution.iterations
    (tensor([1., 1.]), True, 1)
    """

    needs_symmetric = True

    def __init__(
        self, max_iter: int = 20, tol: float = 1e-6, damping: float = 0.0, preconditioner: LinearSolver | None = None
    ) -> None:
        self.max_iter = integer("ConjugateGradient(max_iter=...)", max_iter)
        self.tol = number("ConjugateGradient(tol=...)", tol, above=0)
        self.damping = number("ConjugateGradient(damping=...)", damping, at_least=0)
        if preconditioner is not None and not _makes(preconditioner):
            what = "a solver that makes a preconditioner, such as `KFAC()`"
            raise value_error("ConjugateGradient(preconditioner=...)", what, preconditioner)
        self.preconditioner = preconditioner

    @override
    def make_preconditioner(self, loss: Callable[[Params], Tensor], theta: Params) -> MatVec | None:
        """Return what ``preconditioner`` makes."""
        return None if self.preconditioner is None else self.preconditioner.make_preconditioner(loss, theta)

    @override
    def solve(self, system: LinearSystem) -> Solution:
        """Return the first iterate that meets the tolerance, or the last good one with ``converged=False``.

        The residual is that of A + λI. Products that are nan make the value nan, for the caller to see.

        Raises:
            MisconfigurationError: A is not symmetric.
        """
        self.check(system)
        unit, restored = normalized(system)
        unit = unit._replace(matvec=self._damped(unit.matvec))
        x, r, products = start(unit)
        p, weight, square = _weighed(unit, r)
        curvature = 1.0
        positive, size = torch.stack([weight, square]).tolist()
        while not size <= self.tol**2 and math.isfinite(size) and not positive <= 0 and products < self.max_iter:
            image = unit.matvec(p)
            products += 1
            slope = unit.dot(p, image)
            step = weight / slope
            next_r = tree.add(r, image, alpha=-step)
            z, next_weight, next_square = _weighed(unit, next_r)
            curvature, next_positive, next_size = torch.stack([slope, next_weight, next_square]).tolist()
            if curvature <= 0:
                break
            x, r, p = tree.add(x, p, alpha=step), next_r, tree.add(z, p, alpha=next_weight / weight)
            weight, square, positive, size = next_weight, next_square, next_positive, next_size
        converged = size <= self.tol**2
        if not converged:
            warn_once(self, f"`ConjugateGradient(max_iter={self.max_iter})` {self._reason(size, curvature, positive)}")
        return Solution(restored(x), converged, products, square.sqrt())

    def _damped(self, matvec: MatVec) -> MatVec:
        return lambda v: tree.add(matvec(v), v, alpha=self.damping)

    def _reason(self, size: float, curvature: float, positive: float) -> str:
        if curvature <= 0:
            return (
                f"stopped at a direction of curvature {curvature:.3g}: the inner Hessian is not positive definite. "
                f"Raise `damping`, now {self.damping}, above its most negative eigenvalue."
            )
        if not math.isfinite(size):
            return "met products that are nan or infinite. Look at the inner loss and at its second derivatives."
        if positive <= 0:
            return (
                f"stopped at a residual r with rᵀPr = {positive:.3g}: the system's preconditioner P is not positive "
                "definite. Leave it out."
            )
        return (
            f"reached a relative residual of {math.sqrt(size):.3g}, not `tol={self.tol}`. "
            "Raise `max_iter`, `tol` or `damping`."
        )


def _weighed(system: LinearSystem, r: Params) -> tuple[Params, Tensor, Tensor]:
    """Return P r, rᵀPr and ‖r‖²."""
    z = (system.precondition or same)(r)
    square = system.dot(r, r)
    return z, square if z is r else system.dot(r, z), square


def _makes(solver: object) -> bool:
    """Return whether a solver makes a preconditioner by itself."""
    return isinstance(solver, LinearSolver) and (
        type(solver).make_preconditioner is not LinearSolver.make_preconditioner
    )
