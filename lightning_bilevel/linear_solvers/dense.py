"""The exact solution, by building the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import combination_error
from lightning_bilevel.linear_solvers._common import columns, flat_system
from lightning_bilevel.linear_solvers.base import LinearSolver, MatVec, Solution
from lightning_bilevel.tree import Params


class Dense(LinearSolver):
    r"""Build A by M products with the unit vectors and solve by an LU decomposition: the oracle.

    .. math:: A = [A e_1, \dots, A e_M], \qquad x = A^{-1} b

    Exact to rounding for every non-singular A, indefinite and not symmetric ones too.
    Memory M², cost M products and O(M³) operations.

    Use it to check other solvers and for inner problems of some hundreds of parameters, not beyond.

    >>> import torch
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> solution = Dense().solve(lambda v: {"w": matrix @ v["w"]}, {"w": torch.tensor([3.0, 3.0])})
    >>> solution.value["w"], solution.iterations
    (tensor([1., 1.]), 2)
    """

    @override
    def solve(self, matvec: MatVec, b: Params) -> Solution:
        """Return x = A⁻¹ b.

        Args:
            matvec: v ↦ A v.
            b: the right-hand side.

        Raises:
            MisconfigurationError: A is singular to the precision of its dtype.
            FloatingPointError: a product is nan or infinite.
        """
        apply, flat = flat_system(matvec, b)
        size = flat.numel()
        matrix = columns(apply, flat, range(size), "Dense")
        _check(matrix)
        x = torch.linalg.solve(matrix, flat)
        residual = torch.linalg.vector_norm(flat - matrix @ x) / torch.linalg.vector_norm(flat)
        return Solution(tree.unflatten(x, b), True, size, residual.nan_to_num())


def _check(matrix: Tensor) -> None:
    """Raise unless the inverse of ``matrix`` means something: an LU decomposition takes pivots of 1e-17 for numbers."""
    values = torch.linalg.svdvals(matrix)
    if values[-1] <= torch.finfo(matrix.dtype).eps * values[0]:
        raise combination_error(
            "`Dense` with a singular matrix",
            f"the smallest singular value of the inner Hessian is {values[-1]:.1e}, the largest {values[0]:.1e}",
            "Add weight decay to the inner loss, or use `ConjugateGradient(damping=...)`",
        )
