"""ν by a search over one number, which needs no gradient: a grid, then Brent's method where it is lowest."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from pde.equations import EQUATIONS, observe
from pde.spectral import solve


class Search(NamedTuple):
    """What was found.

    Attributes:
        nu: of the least loss.
        loss: mean squared difference at the observed points.
        solutions: of the equation that it took.
    """

    nu: float
    loss: float
    solutions: int


def search(name: str, observed: np.ndarray, points: int = 20, tolerance: float = 1e-6) -> Search:
    """Return the ν whose solution is nearest to what was observed, in the range that starts are drawn from.

    Args:
        name: of the equation.
        observed: as ``observe`` returns it.
        points: of the grid, evenly spaced in log ν.
        tolerance: of log ν, for Brent's method between the neighbours of the best of them.
    """
    equation, tried = EQUATIONS[name], dict[float, float]()

    def loss(log_nu: float) -> float:
        difference = observe(solve(name, math.exp(log_nu))) - observed
        value = float(np.square(difference).mean())
        tried[float(log_nu)] = value if math.isfinite(value) else 1e6
        return tried[float(log_nu)]

    grid = np.linspace(math.log(equation.smallest), math.log(equation.largest_start), points)
    best = int(np.argmin([loss(log_nu) for log_nu in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": tolerance})
    log_nu = min(tried, key=lambda each: tried[each])
    return Search(math.exp(log_nu), tried[log_nu], len(tried))
