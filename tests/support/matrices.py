"""Linear systems with a known spectrum, for the tests of the linear solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.linear_solvers import LinearSolver, LinearSystem
from lightning_bilevel.tree import Params

M = 10
EYE = torch.eye(M, dtype=torch.float64)
SPECTRUM = torch.linspace(0.5, 4.0, M, dtype=torch.float64)
NAN = float("nan")


def class_name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def symmetric(spectrum: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)).Q
    return q @ torch.diag(spectrum) @ q.T


def right_hand_side() -> Params:
    values = torch.randn(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    like = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in {"w": (2, 3), "s": (), "b": (3,)}.items()}
    return tree.unflatten(values, like)


class Spy:
    """A as a function on trees that counts its calls."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.calls = 0

    def __call__(self, v: Params) -> Params:
        self.calls += 1
        return tree.unflatten(self.matrix @ tree.flatten(v).to(self.matrix.dtype), v)


def solve_flat(solver: LinearSolver, matrix: Tensor, b: Params | None = None) -> Tensor:
    return tree.flatten(solver.solve(LinearSystem(Spy(matrix), b or right_hand_side())).value)


def with_eigenvalue(value: float) -> Tensor:
    return symmetric(torch.cat([SPECTRUM[1:], torch.tensor([value], dtype=torch.float64)]))


NAN_MATRIX = torch.full((M, M), NAN, dtype=torch.float64)
