"""GMRES: systems that are neither symmetric nor definite, restarts, breakdown, complex entries, a hypergradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bilevel import SGD, ImplicitGradient, hypergradient, tree
from lightning_bilevel.inner_optimizers import AdamW
from lightning_bilevel.linear_solvers import GMRES, Dense, LinearSystem, Neumann
from lightning_bilevel.tree import Params
from tests.support.matrices import EYE, M, Spy, right_hand_side
from tests.support.problems import Quadratic, assert_close, draw

ANY = draw(M, M, seed=3) + 2 * EYE  # eigenvalues all around, some of negative real part


def test_solves_what_is_neither_symmetric_nor_definite() -> None:
    assert torch.linalg.eigvals(ANY).real.min() < 0
    solution = GMRES(tol=1e-10).solve(LinearSystem(Spy(ANY), right_hand_side(), symmetric=False))
    expected = torch.linalg.solve(ANY, tree.flatten(right_hand_side()))
    torch.testing.assert_close(tree.flatten(solution.value), expected, rtol=1e-8, atol=1e-8)
    assert (solution.converged, solution.iterations) == (True, M)


def test_the_residual_is_the_least_over_the_krylov_space() -> None:
    b = tree.flatten(right_hand_side())
    for count in (1, 3, 6):
        with pytest.warns(UserWarning, match="reached a relative residual"):
            solution = GMRES(max_iter=count).solve(LinearSystem(Spy(ANY), right_hand_side(), symmetric=False))
        space = torch.stack([torch.linalg.matrix_power(ANY, k) @ b for k in range(1, count + 1)], 1)
        least = (b - space @ torch.linalg.lstsq(space, b[:, None]).solution[:, 0]).norm() / b.norm()
        torch.testing.assert_close(solution.residual, least, rtol=1e-6, atol=1e-9)
        left = (b - ANY @ tree.flatten(solution.value)).norm() / b.norm()
        torch.testing.assert_close(left, least, rtol=1e-6, atol=1e-9)
        assert solution.iterations == count


def test_products_of_restarts_count() -> None:
    matrix, spy = EYE + 0.1 * draw(M, M, seed=5), Spy(EYE + 0.1 * draw(M, M, seed=5))
    solution = GMRES(max_iter=100, restart=3, tol=1e-10).solve(LinearSystem(spy, right_hand_side(), symmetric=False))
    assert solution.converged
    assert solution.iterations == spy.calls > M
    torch.testing.assert_close(matrix @ tree.flatten(solution.value), tree.flatten(right_hand_side()))


def test_a_stall_is_reported() -> None:
    """A cyclic shift: nothing is gained before the M-th product, and a shorter cycle gains nothing at all."""
    shift = EYE.roll(1, 0)
    b = tree.unflatten(EYE[0], right_hand_side())
    with pytest.warns(UserWarning, match=r"reached a relative residual of 1, not `tol=1e-06`"):
        solution = GMRES(max_iter=1000, restart=4).solve(LinearSystem(Spy(shift), b, symmetric=False))
    assert solution.iterations < 20
    whole = GMRES().solve(LinearSystem(Spy(shift), b, symmetric=False))
    assert (whole.converged, whole.iterations) == (True, M)


def test_an_invariant_space_ends_it() -> None:
    """Few eigenvalues: as many products. A singular matrix with b in its range: solved."""
    spectrum = torch.tensor([1.0, 2.0, 3.0]).repeat(4)[:M].double()
    solution = GMRES(tol=1e-14).solve(LinearSystem(Spy(torch.diag(spectrum)), right_hand_side()))
    assert solution.iterations <= 4
    singular = torch.diag(torch.tensor([0.0, *range(1, M)]).double())
    b = tree.unflatten(singular @ tree.flatten(right_hand_side()), right_hand_side())
    solution = GMRES(tol=1e-8).solve(LinearSystem(Spy(singular), b))
    assert solution.converged
    torch.testing.assert_close(singular @ tree.flatten(solution.value), tree.flatten(b), rtol=1e-6, atol=1e-6)


def test_no_solution_is_not_a_number_that_explodes() -> None:
    """b outside the range of a singular A: the residual is what is left, and x stays finite."""
    singular = torch.diag(torch.tensor([0.0, *[1.0] * (M - 1)]).double())
    with pytest.warns(UserWarning, match="reached a relative residual"):
        solution = GMRES().solve(LinearSystem(Spy(singular), right_hand_side()))
    b = tree.flatten(right_hand_side())
    torch.testing.assert_close(solution.residual, b[0].abs() / b.norm())
    assert tree.norm(solution.value) < 10 * b.norm()


def test_complex_entries_count_as_two() -> None:
    real = draw(6, 6, seed=7) + 3 * torch.eye(6).double()  # linear over the reals, not over the complex numbers
    b: Params = {"z": torch.complex(draw(3, seed=8), draw(3, seed=9))}

    def matvec(v: Params) -> Params:
        flat = real @ torch.view_as_real(v["z"]).reshape(-1)
        return {"z": torch.view_as_complex(flat.reshape(3, 2))}

    solution = GMRES(tol=1e-12).solve(LinearSystem(matvec, b, symmetric=False))
    torch.testing.assert_close(matvec(solution.value), b)


def test_a_preconditioner_from_the_right_keeps_the_residual_true() -> None:
    scales = torch.logspace(-3, 3, M, dtype=torch.float64)
    matrix = (EYE + 0.1 * draw(M, M, seed=5)) * scales
    system = LinearSystem(Spy(matrix), right_hand_side(), precondition=Spy(torch.diag(1 / scales)), symmetric=False)
    solution = GMRES(tol=1e-9).solve(system)
    b = tree.flatten(right_hand_side())
    left = (b - matrix @ tree.flatten(solution.value)).norm() / b.norm()
    assert solution.converged
    assert left < 1e-8


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.3, momentum=0.5), AdamW(lr=0.05, weight_decay=0.3)], ids=["SGD", "AdamW"]
)
def test_hypergradient_at_a_fixed_point(optimizer: object) -> None:
    class Fixed(Quadratic):
        def configure_inner_optimizer(self):
            return optimizer

    module = Fixed(inner_steps=400)
    data = module.episode()
    result, exact = (
        hypergradient(module, ImplicitGradient(solver, form="fixed_point"), data)
        for solver in (GMRES(max_iter=100, restart=100, tol=1e-12), Dense())
    )
    assert_close(result.grads, exact.grads, 1e-6)


def test_converges_where_a_neumann_series_does_not() -> None:
    rotation = torch.block_diag(*[torch.tensor([[0.0, -1.5], [1.5, 0.0]]).double()] * (M // 2))
    system = LinearSystem(Spy(EYE - rotation.T), right_hand_side(), symmetric=False)
    with pytest.warns(UserWarning, match="diverges"):
        Neumann(terms=30, step_size=1.0).solve(system)
    solution: Tensor = tree.flatten(GMRES().solve(system).value)
    torch.testing.assert_close(solution, torch.linalg.solve(EYE - rotation.T, tree.flatten(right_hand_side())))
