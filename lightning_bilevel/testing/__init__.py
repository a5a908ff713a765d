"""Tests of hypergradient strategies from anywhere, and the small problems with known hypergradients they are run on.

Knows every wing, and none knows it; imports without pytest. Read :mod:`~lightning_bilevel.testing.check` first, whose
``check_strategy`` goes through the table of properties, then :mod:`~lightning_bilevel.testing.estimates`, where most of
them are.
"""

from lightning_bilevel.testing.check import check_strategy
from lightning_bilevel.testing.problems import (
    Centred,
    Initialization,
    Quadratic,
    Rates,
    Ridge,
    RidgeBlackBox,
    RidgeSolver,
    Several,
)
from lightning_bilevel.testing.solved import PlainProblem, Solution, SolvedModule

__all__ = [
    "Centred",
    "Initialization",
    "PlainProblem",
    "Quadratic",
    "Rates",
    "Ridge",
    "RidgeBlackBox",
    "RidgeSolver",
    "Several",
    "Solution",
    "SolvedModule",
    "check_strategy",
]
