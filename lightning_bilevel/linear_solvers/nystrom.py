"""A low-rank approximation of the matrix, inverted in closed form."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel.errors import integer, number
from lightning_bilevel.linear_solvers._common import FLAT, columns, flattened
from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, Solution


class Nystrom(LinearSolver):
    r"""Approximate A from r of its columns and invert A_r + ρI in closed form.

    .. math:: A_r = C W^+ C^\top, \quad C = A_{:,K}, \quad W = A_{K,K}, \qquad x = (A_r + \rho I)^{-1} b

    with K a set of r random coordinates. Biased by ρ and by ‖A − A_r‖; x = (A + ρI)⁻¹ b to rounding
    if r = M and A is positive semi-definite. Memory r × M, cost r products and O(r² M) operations; a complex entry
    counts twice in M. A system's x0 and preconditioner are not used.

    The textbook form of the Woodbury identity, (ρW + CᵀC)⁻¹, squares the condition number and fails on a
    singular W. Here C = QR is decomposed first and R W⁺ Rᵀ = V D Vᵀ after it, by the SVD of its square root, so
    that with P = QV

    .. math:: x = P (D + \rho I)^{-1} P^\top b + \frac{1}{\rho} (b - P P^\top b),

    where W⁺ leaves out eigenvalues of W that are negative or below rounding. D ≥ 0 then, and
    ‖x‖ ≤ ‖b‖/ρ whatever A is.

    Use it when A is close to low rank, as Hessians of over-parameterized networks are: no tuned step size, no
    iteration that can diverge. Not when many eigenvalues matter, nor for accuracy below ρ. The
    same coordinates are drawn at every solve, so that all processes and a resumed run agree.

    Paper: Hataya and Yamada (2023), Nyström Method for Accurate and Scalable Implicit Differentiation (arXiv
    2302.09726).

    Args:
        rank: r, the number of columns; at most M are taken.
        rho: ρ, in units of A's eigenvalues; the part of b outside the sampled range is divided by it.
        seed: seed of the choice of columns.

    Raises:
        ValueError: ``rank`` is not a positive integer, ``rho`` not a positive number or ``seed`` not a non-negative
            integer.

    >>> import torch
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> system = LinearSystem(lambda v: {"w": matrix @ v["w"]}, {"w": torch.tensor([4.0, 4.0])})
    >>> Nystrom(rank=2, rho=1.0).solve(system).value["w"].round(decimals=4)
    tensor([1., 1.])
    """

    needs_symmetric = True
    needs_whole_vectors = True

    def __init__(self, rank: int = 10, rho: float = 1e-2, seed: int = 0) -> None:
        self.rank = integer("Nystrom(rank=...)", rank)
        self.rho = number("Nystrom(rho=...)", rho, above=0)
        self.seed = integer("Nystrom(seed=...)", seed, least=0)

    @override
    def solve(self, system: LinearSystem) -> Solution:
        """Return x = (A_r + ρI)⁻¹ b.

        Raises:
            MisconfigurationError: A is not symmetric.
            FloatingPointError: a product is nan or infinite.
        """
        self.check(system)
        flat, restored = flattened(system)
        b = flat.b[FLAT]
        rank = min(self.rank, len(b))
        chosen = random.Random(self.seed).sample(range(len(b)), rank)
        sampled = columns(flat, chosen, "Nystrom")
        basis, values = _eigen(sampled, sampled[chosen])
        inside = basis.T @ b
        x = basis @ (inside / (values + self.rho)) + (b - basis @ inside) / self.rho
        return Solution(restored({FLAT: x}), None, rank, None)


def _eigen(sampled: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Return P of shape ``(M, r)`` and D of shape ``(r,)`` with C W⁺ Cᵀ = P diag(D) Pᵀ."""
    weights, vectors = torch.linalg.eigh((core + core.T) / 2)
    q, r = torch.linalg.qr(sampled)
    # numpy's rule for the rank of a matrix: below it an eigenvalue is rounding and its inverse is noise.
    kept = weights > weights.abs().max() * len(weights) * torch.finfo(weights.dtype).eps
    root = r @ vectors * torch.where(kept, weights, torch.inf).rsqrt()
    rotation, singular, _ = torch.linalg.svd(root)
    return q @ rotation, singular**2
