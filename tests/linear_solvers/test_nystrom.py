"""Nyström's approximation: exact at its rank, bounded on what is not positive definite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.linear_solvers import LinearSystem, Nystrom
from tests.support.matrices import EYE, SPECTRUM, M, Spy, right_hand_side, solve_flat, symmetric, with_eigenvalue


def test_nystrom_is_exact_on_a_matrix_of_its_rank() -> None:
    matrix = symmetric(torch.cat([SPECTRUM[-3:], torch.zeros(M - 3, dtype=torch.float64)]))
    expected = torch.linalg.solve(matrix + 0.01 * EYE, tree.flatten(right_hand_side()))
    for rank in (3, 6, M):  # above 3 the core is singular
        torch.testing.assert_close(solve_flat(Nystrom(rank, rho=0.01), matrix), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solve_flat(Nystrom(3, rho=0.01, seed=5), matrix), expected, rtol=1e-6, atol=1e-6)
    float32 = solve_flat(Nystrom(6, rho=0.01), matrix.float(), tree.map(Tensor.float, right_hand_side()))
    torch.testing.assert_close(float32, expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("lowest", [-1e-8, -1e-3, -1.0])
@pytest.mark.parametrize("rank", [1, 5, M])
def test_nystrom_stays_bounded_on_an_indefinite_matrix(lowest: float, rank: int) -> None:
    b = right_hand_side()
    value = Nystrom(rank, rho=0.1).solve(LinearSystem(Spy(with_eigenvalue(lowest)), b)).value
    assert tree.norm(value) <= tree.norm(b) / 0.1 * (1 + 1e-9)


def test_nystrom_of_full_rank_leaves_out_negative_eigenvalues() -> None:
    matrix = with_eigenvalue(-1.0)
    expected = torch.linalg.solve(with_eigenvalue(0.0) + 0.1 * EYE, tree.flatten(right_hand_side()))
    torch.testing.assert_close(solve_flat(Nystrom(M, rho=0.1), matrix), expected)


def test_nystrom_divides_by_rho_where_parameters_are_dead() -> None:
    matrix, flat = symmetric(SPECTRUM), tree.flatten(right_hand_side())
    matrix[:4] = matrix[:, :4] = 0.0
    torch.testing.assert_close(solve_flat(Nystrom(M, rho=0.1), matrix), torch.linalg.solve(matrix + 0.1 * EYE, flat))
    torch.testing.assert_close(solve_flat(Nystrom(M, rho=0.1), 0 * matrix), flat / 0.1)


def test_nystrom_draws_its_columns_without_the_global_generator() -> None:
    matrix = symmetric(SPECTRUM)
    before = torch.get_rng_state()
    first, again, other = (solve_flat(Nystrom(rank=3, seed=seed), matrix) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
