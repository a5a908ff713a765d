"""The exact solution, by building the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel.errors import combination_error
from lightning_bilevel.linear_solvers._common import FLAT, columns, flattened
from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, Solution


class Dense(LinearSolver):
    r"""Build A by M products with the unit vectors and solve by an LU decomposition: the oracle.

    .. math:: A = [A e_1, \dots, A e_M], \qquad x = A^{-1} b

    Exact to rounding for every non-singular A, indefinite and not symmetric ones too. Memory M², cost M products and
    O(M³) operations; a complex entry counts twice in M. A system's x0 and preconditioner are not used.

    Use it to check other solvers and for inner problems of some hundreds of parameters, not beyond.

    >>> import torch
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> solution = Dense().solve(LinearSystem(lambda v: {"w": matrix @ v["w"]}, {"w": torch.tensor([3.0, 3.0])}))
    >>> solution.value["w"], solution.iterations
    (tensor([1., 1.]), 2)
    """

    needs_whole_vectors = True

    @override
    def solve(self, system: LinearSystem) -> Solution:
        """Return x = A⁻¹ b.

        Raises:
            MisconfigurationError: A is singular to the precision of its dtype.
            FloatingPointError: a product is nan or infinite.
        """
        flat, restored = flattened(system)
        b = flat.b[FLAT]
        matrix = columns(flat, range(len(b)), "Dense")
        _check(matrix, system.symmetric)
        x = torch.linalg.solve(matrix, b)
        residual = torch.linalg.vector_norm(b - matrix @ x) / torch.linalg.vector_norm(b)
        return Solution(restored({FLAT: x}), True, len(b), residual.nan_to_num())


def _check(matrix: Tensor, symmetric: bool) -> None:
    """Raise unless the inverse of ``matrix`` means something: an LU decomposition takes pivots of 1e-17 for numbers."""
    values = torch.linalg.svdvals(matrix)
    if values[-1] <= torch.finfo(matrix.dtype).eps * values[0]:
        name, instead = "I − ∂Ω/∂θ", "Use `Neumann(terms=K, step_size=1.0)`, the derivative of K iterations"
        if symmetric:
            name = "the inner Hessian"
            instead = "Add weight decay to the inner loss, or use `ConjugateGradient(damping=...)`"
        raise combination_error(
            "`Dense` with a singular matrix",
            f"the smallest singular value of {name} is {values[-1]:.1e}, the largest {values[0]:.1e}",
            instead,
        )
