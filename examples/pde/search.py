"""ν without a hypergradient: a grid, then Brent's method where it is lowest; or Adam on differences of the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

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
        value = distance(name, log_nu, observed)
        tried[float(log_nu)] = value if math.isfinite(value) else 1e6
        return tried[float(log_nu)]

    grid = np.linspace(math.log(equation.smallest), math.log(equation.largest_start), points)
    best = int(np.argmin([loss(log_nu) for log_nu in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": tolerance})
    log_nu = min(tried, key=lambda each: tried[each])
    return Search(math.exp(log_nu), tried[log_nu], len(tried))


def distance(name: str, log_nu: float, observed: np.ndarray) -> float:
    """Return the mean squared difference of a solution from what was observed."""
    return float(np.square(observe(solve(name, math.exp(log_nu))) - observed).mean())


def descend(
    name: str, observed: np.ndarray, start: float, steps: int = 150, lr: float = 0.2, mu: float = 1e-4
) -> Search:
    """Return where the optimizer of ``Discovery`` ends on central differences: two solutions a step, as it takes there.

    Args:
        name: of the equation.
        observed: as ``observe`` returns it.
        start: the first ν.
        steps: of Adam.
        lr: of log ν, at first.
        mu: of the differences, in log ν.
    """
    equation = EQUATIONS[name]
    edges = math.log(equation.smallest), math.log(max(equation.largest_start, start))
    log_nu = torch.tensor(math.log(start), dtype=torch.float64)
    optimizer, schedule = adam(log_nu, lr, steps)
    for _ in range(steps):
        at = log_nu.item()
        ahead, behind = (distance(name, at + sign * mu, observed) for sign in (1, -1))
        log_nu.grad = torch.tensor((ahead - behind) / (2 * mu), dtype=torch.float64)
        optimizer.step()
        schedule.step()
        log_nu.clamp_(*edges)
    return Search(log_nu.exp().item(), (ahead + behind) / 2, 2 * steps)


def adam(log_nu: Tensor, lr: float, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer of log ν, and the cosine along which its learning rate falls to 0."""
    # The gradient grows and shrinks by orders of magnitude within a few steps on the way from a far start:
    # Adam's moments have to forget as fast, or its steps become too small long before the end.
    optimizer = torch.optim.Adam([log_nu], lr=lr, betas=(0.5, 0.5))
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
