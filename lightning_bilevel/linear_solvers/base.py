"""The interface of a linear solver that sees its matrix through products only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lightning_bilevel.tree import Params

MatVec = Callable[[Params], Params]


class Solution(NamedTuple):
    """The answer of a linear solver.

    Attributes:
        value: x, named and shaped as the right-hand side.
        converged: whether the residual met the tolerance; ``None`` for solvers that do not aim at one.
        iterations: products with A that were taken.
        residual: ‖b − A x‖ / ‖b‖ where the solver knows it, else ``None``.
    """

    value: Params
    converged: bool | None
    iterations: int
    residual: Tensor | None


class LinearSolver(ABC):
    """Solves A x = b for a symmetric A that is known by its products A v.

    Attributes:
        blockwise: whether a block-diagonal A is solved block by block, so that the systems of several
            episodes may pass as one.
    """

    blockwise: bool = False

    @abstractmethod
    def solve(self, matvec: MatVec, b: Params) -> Solution:
        """Return x with A x ≈ b.

        Args:
            matvec: v ↦ A v on trees named and shaped as ``b``.
            b: the right-hand side.
        """
