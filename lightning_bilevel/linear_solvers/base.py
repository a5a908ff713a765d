"""The interface of a linear solver that sees its matrix through products only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import combination_error
from lightning_bilevel.tree import Params

MatVec = Callable[[Params], Params]
Dot = Callable[[Params, Params], Tensor]
Series = Callable[[Params, int, float], tuple[Params, Params, Params] | None]
"""(v, K, α) to Σ_{k<K} (I − αA)ᵏ v, its last term and the one before (v where K = 1); ``None``: product by product."""


class LinearSystem(NamedTuple):
    """A x = b, with A known by its products.

    Vectors are trees named, shaped and typed as ``b``: so are the arguments of the functions. A complex entry counts as
    two real ones, and A need only be linear over the reals, as the Hessian of a real loss of complex parameters is.

    Attributes:
        matvec: v ↦ A v.
        b: the right-hand side.
        x0: a guess of x, from which iterations start (a warm start); ``None``: zero.
        precondition: v ↦ P v, with P an approximation of A⁻¹ that costs less than a product, symmetric and positive
            definite where A is; ``None``: the identity.
        dot: the inner product of two vectors, a real 0-dim tensor: Re(ūᵀ v) over all entries. Where each process holds
            a part of the vectors, it sums over the processes.
        symmetric: whether A is symmetric with respect to ``dot``, as a Hessian is. The system of a fixed point,
            (I − ∂Ω/∂θ)ᵀ x = b, is not.
        series: sums terms of a Neumann series at once, where that takes less time than one product after the other.

    >>> import torch
    >>> LinearSystem(lambda v: {"w": 2 * v["w"]}, {"w": torch.tensor([8.0])}).symmetric
    True
    """

    matvec: MatVec
    b: Params
    x0: Params | None = None
    precondition: MatVec | None = None
    dot: Dot = tree.dot
    symmetric: bool = True
    series: Series | None = None


class Solution(NamedTuple):
    """The answer of a linear solver.

    Attributes:
        value: x, named, shaped and typed as the right-hand side, without a graph.
        converged: whether the residual met the tolerance; ``None`` for solvers that do not aim at one.
        iterations: products with A that were taken.
        residual: ‖b − A x‖ / ‖b‖ where the solver knows it, else ``None``.

    >>> import torch
    >>> from lightning_bilevel.linear_solvers import ConjugateGradient
    >>> system = LinearSystem(lambda v: {"w": 2 * v["w"]}, {"w": torch.tensor([8.0])})
    >>> solution = ConjugateGradient().solve(system)
    >>> solution.value, solution.converged, solution.iterations
    ({'w': tensor([4.])}, True, 1)
    """

    value: Params
    converged: bool | None
    iterations: int
    residual: Tensor | None


class LinearSolver(ABC):
    """Solves A x = b for an A that is known by its products A v.

    Attributes:
        supports_stacking: whether a block-diagonal A is solved block by block, so that the systems of several
            episodes may pass as one.
        needs_symmetric: whether A has to be symmetric; :meth:`check` refuses others.
        needs_whole_vectors: whether it indexes the entries of vectors, which a process that holds a part of them
            cannot do.
        wants_preconditioner: whether it asks whoever makes the system for ``precondition``.

    >>> import torch
    >>> class Diagonal(LinearSolver):
    ...     def solve(self, system):
    ...         diagonal = system.matvec({name: torch.ones_like(value) for name, value in system.b.items()})
    ...         return Solution({name: value / diagonal[name] for name, value in system.b.items()}, None, 1, None)
    >>> Diagonal().solve(LinearSystem(lambda v: {"w": 4 * v["w"]}, {"w": torch.tensor([8.0])})).value
    {'w': tensor([2.])}
    """

    supports_stacking: bool = False
    needs_symmetric: bool = False
    needs_whole_vectors: bool = False
    wants_preconditioner: bool = False

    def make_preconditioner(self, loss: Callable[[Params], Tensor], theta: Params) -> MatVec | None:
        """Return P, made of the loss whose Hessian A is, for ``precondition``; by default ``None``, it makes none.

        Args:
            loss: θ to g, a 0-dim tensor.
            theta: where.
        """
        return None

    @abstractmethod
    def solve(self, system: LinearSystem) -> Solution:
        """Return x with A x ≈ b."""

    def check(self, system: LinearSystem) -> None:
        """Refuse a system that is not of the form this solver needs; solvers that need one call it first.

        Raises:
            MisconfigurationError: the solver needs a symmetric A and the system has another.
        """
        if self.needs_symmetric and not system.symmetric:
            name = type(self).__name__
            raise combination_error(
                f"`{name}` with a linear system that is not symmetric",
                f"`{name}` assumes A = Aᵀ, which the system of a fixed point, (I − ∂Ω/∂θ)ᵀ x = b, does not have",
                "Use `GMRES()`, `Neumann(step_size=1.0)` or `Dense()`",
            )
