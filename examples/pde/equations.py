"""The three equations of (FG)²U, arXiv 2406.14095, appendix E.3, and where their solutions are observed.

All live on x in [-1, 1], t in [0, 1], and each has one unknown coefficient ν. Solutions are arrays of 256 times
(1/256, 2/256, ..., 1; the start is known) by 512 points (-1, -1 + 2/512, ...), which is how the paper's "256 × 512"
is read here: the fronts are too thin for 256 points. The 8 × 8 observations are at t = 1/8, ..., 1 and
x = -7/8, -5/8, ..., 7/8, every one of them a point of that grid; the paper does not say where its own are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

TIMES, POINTS = 256, 512
Field = TypeVar("Field", np.ndarray, Tensor)


@dataclass(frozen=True)
class Equation:
    """One equation with an unknown coefficient ν.

    Attributes:
        title: its name.
        formula: u_t + ... = 0, for the titles of figures.
        nu: the ν to be found.
        largest_start: starts are drawn from (0, ``largest_start``].
        smallest: the least ν that the default grid of the spectral solver resolves.
        order: of the highest derivative in x.
        boundary: u is given at x = ±1 (by the initial condition's value there), or periodic.
        initial: u(0, x).
        rate: (u, u_x, u_xx, u_xxx, ν) to u_t; derivatives above ``order`` are not given.
    """

    title: str
    formula: str
    nu: float
    largest_start: float
    smallest: float
    order: Literal[2, 3]
    boundary: Literal["given", "periodic"]
    initial: Callable[[Tensor], Tensor]
    rate: Callable[..., Tensor]


EQUATIONS = {
    "burgers": Equation(
        title="Burgers",
        formula=r"$u_t + u\,u_x = \nu\,u_{xx}$",
        nu=0.01 / np.pi,
        largest_start=10.0,
        smallest=1e-3,
        order=2,
        boundary="given",
        initial=lambda x: -torch.sin(torch.pi * x),
        rate=lambda u, u_x, u_xx, nu: nu * u_xx - u * u_x,
    ),
    "allen-cahn": Equation(
        title="Allen–Cahn",
        formula=r"$u_t = \nu\,u_{xx} + 5\,(u - u^3)$",
        nu=0.001,
        largest_start=0.1,
        smallest=1e-4,
        order=2,
        boundary="given",
        initial=lambda x: x**2 * torch.cos(torch.pi * x),
        rate=lambda u, u_x, u_xx, nu: nu * u_xx + 5 * (u - u**3),
    ),
    "kdv": Equation(
        title="Korteweg–de Vries",
        formula=r"$u_t + u\,u_x + \nu\,u_{xxx} = 0$",
        nu=0.0025,
        largest_start=0.01,
        smallest=2e-4,
        order=3,
        boundary="periodic",
        initial=lambda x: torch.cos(torch.pi * x),
        rate=lambda u, u_x, u_xx, u_xxx, nu: -u * u_x - nu * u_xxx,
    ),
}


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Return the times (256,) and the points (512,) of a solution."""
    return np.arange(1, TIMES + 1) / TIMES, -1 + 2 * np.arange(POINTS) / POINTS


def observe(u: Field) -> Field:
    """Return the 8 × 8 observed entries of a solution (256, 512), or of the times (256, 1) or points (1, 512)."""
    rows = u[31::32] if u.shape[0] > 1 else u
    return rows[:, 32::64] if u.shape[1] > 1 else rows
