"""The Neumann series is the sum of its powers, and says nothing where it neither converges nor diverges."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.linear_solvers import LinearSystem, Neumann
from tests.support.matrices import EYE, SPECTRUM, Spy, right_hand_side, solve_flat, symmetric, with_eigenvalue


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_the_sum_of_explicit_powers(terms: int) -> None:
    matrix, b = symmetric(SPECTRUM), right_hand_side()
    contraction = EYE - 0.2 * matrix
    powers = sum(torch.linalg.matrix_power(contraction, k) for k in range(terms))
    expected = 0.2 * powers @ tree.flatten(b)
    torch.testing.assert_close(solve_flat(Neumann(terms, step_size=0.2), matrix), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lowest", [0.5, 0.0])
def test_neumann_is_silent_at_the_edge_of_its_assumption(lowest: float, dtype: torch.dtype) -> None:
    # Terms that keep their norm but for rounding, at α = 2/λ_max or in the null space of A, do not diverge.
    matrix, b = with_eigenvalue(lowest).to(dtype), tree.map(lambda part: part.to(dtype), right_hand_side())
    for terms in (2, 100, 1000, 1001):
        assert Neumann(terms, step_size=0.5).solve(LinearSystem(Spy(matrix), b)).converged is None
