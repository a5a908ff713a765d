"""Solvers of A x = b that see A through its products only, for the implicit hypergradient: one a file."""

from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, Solution
from lightning_bilevel.linear_solvers.conjugate_gradient import ConjugateGradient
from lightning_bilevel.linear_solvers.dense import Dense
from lightning_bilevel.linear_solvers.gmres import GMRES
from lightning_bilevel.linear_solvers.identity import Identity
from lightning_bilevel.linear_solvers.kfac import KFAC
from lightning_bilevel.linear_solvers.neumann import Neumann
from lightning_bilevel.linear_solvers.nystrom import Nystrom

__all__ = [
    "GMRES",
    "KFAC",
    "ConjugateGradient",
    "Dense",
    "Identity",
    "LinearSolver",
    "LinearSystem",
    "Neumann",
    "Nystrom",
    "Solution",
]
