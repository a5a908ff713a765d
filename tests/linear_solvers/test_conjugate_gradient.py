"""Conjugate gradients: where they stop, and what they return there."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.linear_solvers import ConjugateGradient, LinearSystem
from tests.support.matrices import EYE, SPECTRUM, M, Spy, right_hand_side, symmetric, with_eigenvalue


def test_conjugate_gradient_stops_at_the_number_of_eigenvalues_and_reports_the_residual() -> None:
    matrix, b = symmetric(torch.tensor([1.0, 2.0, 3.0]).repeat(4)[:M].double()), right_hand_side()
    solution = ConjugateGradient(tol=1e-10).solve(LinearSystem(Spy(matrix), b))
    assert (solution.converged, solution.iterations) == (True, 3)
    loose = ConjugateGradient(tol=0.1, damping=0.5).solve(LinearSystem(Spy(matrix), b))
    flat = tree.flatten(b)
    residual = flat - (matrix + 0.5 * EYE) @ tree.flatten(loose.value)
    assert loose.residual is not None
    assert loose.residual <= 0.1
    torch.testing.assert_close(loose.residual, residual.norm() / flat.norm())


def test_conjugate_gradient_does_not_care_about_units() -> None:
    b = tree.map(lambda part: part.float() * 1e-15, right_hand_side())
    solution = ConjugateGradient().solve(LinearSystem(Spy(symmetric(SPECTRUM).float()), b))
    assert (solution.converged, solution.iterations) == (True, M)


def test_conjugate_gradient_keeps_the_last_good_iterate() -> None:
    matrix, b = with_eigenvalue(-0.05), right_hand_side()
    with pytest.warns(UserWarning, match=r"^`ConjugateGradient\(max_iter=20\)` stopped"):
        stopped = ConjugateGradient().solve(LinearSystem(Spy(matrix), b))
    assert stopped.iterations > 1
    with pytest.warns(UserWarning, match=r"reached a relative residual"):
        before = ConjugateGradient(max_iter=stopped.iterations - 1).solve(LinearSystem(Spy(matrix), b))
    torch.testing.assert_close(stopped.value, before.value, rtol=0, atol=0)
    torch.testing.assert_close(stopped.residual, before.residual, rtol=0, atol=0)
    damped = ConjugateGradient(damping=0.2, tol=1e-12).solve(LinearSystem(Spy(matrix), b))
    expected = torch.linalg.solve(matrix + 0.2 * EYE, tree.flatten(b))
    torch.testing.assert_close(tree.flatten(damped.value), expected)
