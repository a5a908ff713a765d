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

    >>> import torch
    >>> from lightning_bilevel.linear_solvers import ConjugateGradient
    >>> solution = ConjugateGradient().solve(lambda v: {"w": 2 * v["w"]}, {"w": torch.tensor([8.0])})
    >>> solution.value, solution.converged, solution.iterations
    ({'w': tensor([4.])}, True, 1)
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

    >>> import torch
    >>> class Diagonal(LinearSolver):
    ...     def solve(self, matvec, b):
    ...         diagonal = matvec({name: torch.ones_like(value) for name, value in b.items()})
    ...         return Solution({name: value / diagonal[name] for name, value in b.items()}, None, 1, None)
    >>> Diagonal().solve(lambda v: {"w": 4 * v["w"]}, {"w": torch.tensor([8.0])}).value
    {'w': tensor([2.])}
    """

    blockwise: bool = False

    @abstractmethod
    def solve(self, matvec: MatVec, b: Params) -> Solution:
        """Return x with A x ≈ b.

        Args:
            matvec: v ↦ A v on trees named and shaped as ``b``.
            b: the right-hand side.
        """
