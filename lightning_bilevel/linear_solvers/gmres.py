"""The generalized minimal residual method, for systems that are not symmetric."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import integer, number
from lightning_bilevel.linear_solvers._common import normalized, same, start, warn_once
from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, Solution
from lightning_bilevel.tree import Params

_BREAKDOWN = 1e-14
"""A column of the projected system that is smaller than this, relative to its products, says nothing: A is singular."""


class GMRES(LinearSolver):
    r"""Solves A x = b for any A by minimal residuals over a Krylov space, preconditioned by P from the right.

    .. math:: x_k = \arg\min_{x \in x_0 + \mathcal{K}_k} \|b - A x\|,
              \qquad \mathcal{K}_k = \mathrm{span}\{P r_0, (P A) P r_0, \dots, (P A)^{k-1} P r_0\}

    with r₀ = b − A x₀; x₀ = 0 and P = I where the system has none. A need be neither symmetric nor definite: it is the
    solver for the system of a fixed point, (I − ∂Ω/∂θ)ᵀ x = b, that also converges where
    :class:`~lightning_bilevel.linear_solvers.Neumann` diverges. Exact in M products up to rounding without restarts,
    and the residual never grows. It stops at ‖b − A x‖ ≤ tol ‖b‖.

    Memory: ``restart`` vectors of M entries. One product, 2k inner products and one device synchronization at the k-th
    iteration of a cycle, and a product to begin each but the first. A restart forgets the space, and may stall where A
    is indefinite: then raise ``restart``.

    Not for a symmetric positive definite A, a Hessian at a minimum:
    :class:`~lightning_bilevel.linear_solvers.ConjugateGradient` needs three vectors.

    Paper: Saad and Schultz (1986).

    Args:
        max_iter: the most products a solve may take, those that begin a cycle included.
        restart: iterations in a cycle.
        tol: relative residual at which to stop.

    Raises:
        ValueError: ``max_iter`` or ``restart`` is not a positive integer, or ``tol`` not positive.

    >>> import torch
    >>> matrix = torch.tensor([[1.0, 2.0], [-2.0, 1.0]])
    >>> system = LinearSystem(lambda v: {"w": matrix @ v["w"]}, {"w": torch.tensor([3.0, -1.0])}, symmetric=False)
    >>> solution = GMRES().solve(system)
    >>> solution.value["w"].round(decimals=4), solution.converged, solution.iterations
    (tensor([1., 1.]), True, 2)
    """

    def __init__(self, max_iter: int = 20, restart: int = 20, tol: float = 1e-6) -> None:
        self.max_iter = integer("GMRES(max_iter=...)", max_iter)
        self.restart = integer("GMRES(restart=...)", restart)
        self.tol = number("GMRES(tol=...)", tol, above=0)

    @override
    def solve(self, system: LinearSystem) -> Solution:
        """Return the iterate at which it stops, with ``converged=False`` if that misses the tolerance.

        Products that are nan make the value nan, for the caller to see.
        """
        unit, restored = normalized(system)
        x, r, products = start(unit)
        size, before = unit.dot(r, r).sqrt(), math.inf
        while (length := size.item()) > self.tol and length < before and products < self.max_iter:
            before = length
            cycle = _Cycle(unit, r, size)
            while products < self.max_iter and not cycle.done(self.restart, self.tol):
                cycle.extend()
                products += 1
            x = tree.add(x, cycle.correction())
            if not math.isfinite(cycle.residual) or cycle.residual <= self.tol or products == self.max_iter:
                size = size.new_tensor(cycle.residual)
                break
            r = tree.sub(unit.b, unit.matvec(x))
            size, products = unit.dot(r, r).sqrt(), products + 1
        left = size.item()
        converged = left <= self.tol
        if not converged:
            warn_once(self, f"`GMRES(max_iter={self.max_iter}, restart={self.restart})` {self._reason(left)}")
        return Solution(restored(x), converged, products, size)

    def _reason(self, size: float) -> str:
        if not math.isfinite(size):
            return "met products that are nan or infinite. Look at the inner loss and at its second derivatives."
        return f"reached a relative residual of {size:.3g}, not `tol={self.tol}`. Raise `max_iter`, `restart` or `tol`."


class _Cycle:
    """An orthonormal basis V of the Krylov space of A P, and min_y ‖r − A P V y‖ by Givens rotations.

    Attributes:
        residual: that minimum.
    """

    def __init__(self, system: LinearSystem, r: Params, size: Tensor) -> None:
        self._system, self._precondition = system, system.precondition or same
        self._basis = [tree.scale(r, 1 / size)]
        self._columns: list[list[float]] = []  # of the triangle that the rotations leave
        self._rotations: list[tuple[float, float]] = []
        self._right = [size.item()]
        self._closed = False  # whether the space is invariant

    @property
    def residual(self) -> float:
        return abs(self._right[-1])

    def done(self, restart: int, tol: float) -> bool:
        ended = self._closed or len(self._columns) == restart
        return ended or self.residual <= tol or not math.isfinite(self.residual)

    def extend(self) -> None:
        """Take one product, and orthogonalize it twice: once leaves rounding of the size of what is subtracted."""
        w = self._system.matvec(self._precondition(self._basis[-1]))
        whole = self._system.dot(w, w).sqrt()
        total = torch.zeros(len(self._basis), dtype=whole.dtype, device=whole.device)
        for _ in range(2):
            parts = torch.stack([self._system.dot(v, w) for v in self._basis])
            for v, part in zip(self._basis, parts, strict=True):
                w = tree.add(w, v, alpha=-part)
            total = total + parts
        rest = self._system.dot(w, w).sqrt()
        *column, norm, length = torch.cat([total, torch.stack([rest, whole])]).tolist()
        self._closed = norm <= _BREAKDOWN * length
        if not self._closed:
            self._basis.append(tree.scale(w, 1 / rest))
        self._rotate(column, 0.0 if self._closed else norm, length)

    def _rotate(self, column: list[float], below: float, length: float) -> None:
        for i, (c, s) in enumerate(self._rotations):
            a, b = column[i], column[i + 1]
            column[i], column[i + 1] = c * a + s * b, c * b - s * a
        size = math.hypot(column[-1], below)
        if size <= _BREAKDOWN * length:  # A P maps the last vector into what was there: it is no use
            return
        c, s = column[-1] / size, below / size
        self._rotations.append((c, s))
        self._columns.append([*column[:-1], size])
        self._right[-1:] = [c * self._right[-1], -s * self._right[-1]]

    def correction(self) -> Params:
        """Return P V y with the y of the minimum."""
        count, y = len(self._columns), [0.0] * len(self._columns)
        for i in reversed(range(count)):
            known = sum(self._columns[j][i] * y[j] for j in range(i + 1, count))
            y[i] = (self._right[i] - known) / self._columns[i][i]
        total = tree.zeros_like(self._basis[0])
        for weight, v in zip(y, self._basis, strict=False):
            total = tree.add(total, v, alpha=weight)
        return self._precondition(total)
