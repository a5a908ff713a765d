"""Linear solvers: agreement with dense algebra in float64, products counted, failures that say what to change."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.linear_solvers import (
    GMRES,
    KFAC,
    ConjugateGradient,
    Dense,
    Identity,
    LinearSolver,
    LinearSystem,
    Neumann,
    Nystrom,
)
from lightning_bilevel.tree import Params
from tests.support.matrices import (
    EYE,
    NAN,
    NAN_MATRIX,
    SPECTRUM,
    M,
    Spy,
    class_name,
    right_hand_side,
    solve_flat,
    symmetric,
    with_eigenvalue,
)
from tests.support.tables import every_solver

EXACT: dict[str, tuple[LinearSolver, float]] = {  # solver, what it adds to the diagonal
    "Neumann": (Neumann(terms=200, step_size=2 / 4.5), 0.0),
    "ConjugateGradient": (ConjugateGradient(max_iter=2 * M, tol=1e-12), 0.0),
    "ConjugateGradient, damped": (ConjugateGradient(tol=1e-12, damping=0.3), 0.3),
    "Nystrom": (Nystrom(rank=M, rho=0.1), 0.1),
    "Nystrom, rank above M": (Nystrom(rank=3 * M, rho=1e-4), 1e-4),
    "Dense": (Dense(), 0.0),
    "GMRES": (GMRES(max_iter=2 * M, tol=1e-12), 0.0),
    "GMRES, restarted": (GMRES(max_iter=200, restart=4, tol=1e-12), 0.0),
}


@pytest.mark.parametrize(("solver", "shift"), EXACT.values(), ids=EXACT)
def test_agrees_with_torch_linalg_solve(solver: LinearSolver, shift: float) -> None:
    matrix, b = symmetric(SPECTRUM), right_hand_side()
    expected = torch.linalg.solve(matrix + shift * EYE, tree.flatten(b))
    value = solver.solve(LinearSystem(Spy(matrix), b)).value
    assert {name: part.shape for name, part in value.items()} == {name: part.shape for name, part in b.items()}
    torch.testing.assert_close(tree.flatten(value), expected, rtol=1e-9, atol=1e-9)


PRODUCTS: list[tuple[LinearSolver, int]] = [
    (Neumann(terms=1, step_size=0.2), 0),
    (Neumann(terms=6, step_size=0.2), 5),
    (ConjugateGradient(tol=1e-9), M),  # as many as there are different eigenvalues
    (Nystrom(rank=4), 4),
    (Nystrom(rank=3 * M), M),
    (Dense(), M),
    (GMRES(tol=1e-9), M),
    (Identity(), 0),
]


@pytest.mark.parametrize(("solver", "products"), PRODUCTS, ids=class_name)
def test_takes_the_documented_number_of_products(solver: LinearSolver, products: int) -> None:
    spy = Spy(symmetric(SPECTRUM))
    assert solver.solve(LinearSystem(spy, right_hand_side())).iterations == products
    assert spy.calls == products


@every_solver
def test_zero_right_hand_side(make: Callable[[], LinearSolver]) -> None:
    solution = make().solve(LinearSystem(Spy(symmetric(SPECTRUM)), tree.zeros_like(right_hand_side())))
    assert tree.norm(solution.value) == 0
    assert solution.converged in (None, True)
    assert solution.residual in (None, 0)


@pytest.mark.parametrize("grad_enabled", [True, False])
@every_solver
def test_hessian_products_by_autograd_leave_no_graph(make: Callable[[], LinearSolver], grad_enabled: bool) -> None:
    matrix = symmetric(SPECTRUM)
    theta = tree.leaves(right_hand_side())

    def matvec(v: Params) -> Params:
        with torch.enable_grad():
            flat = tree.flatten(theta)
            cubic = (flat - flat.detach()).pow(3).sum()  # no curvature here, but the Hessian depends on theta
            gradient = tree.grad(0.5 * flat @ matrix @ flat + cubic, theta, create_graph=True)
            return tree.grad(tree.dot(gradient, v), theta, create_graph=True)

    b = tree.map(lambda part: part.requires_grad_(), right_hand_side())
    with torch.set_grad_enabled(grad_enabled):
        value = make().solve(LinearSystem(matvec, b)).value
    assert not any(part.requires_grad for part in value.values())
    torch.testing.assert_close(tree.flatten(value), solve_flat(make(), matrix))


WARNINGS: dict[str, tuple[LinearSolver, Tensor, str]] = {
    "step too large": (
        Neumann(terms=20, step_size=0.6),  # above 2/λ_max = 0.5
        symmetric(SPECTRUM),
        r"^`Neumann\(step_size=0\.6\)` diverges: its last term has 1\.\d+ times the norm of the one before "
        r"and the other sign\. Lower `step_size` below 2/λ_max\.$",
    ),
    "step slightly too large, long series": (
        Neumann(terms=2000, step_size=0.501),
        symmetric(SPECTRUM),
        r"^`Neumann\(step_size=0\.501\)` diverges: .* the other sign\. Lower `step_size` below 2/λ_max\.$",
    ),
    "negative eigenvalue": (
        Neumann(terms=40, step_size=0.2),
        with_eigenvalue(-1.0),
        r"^`Neumann\(step_size=0\.2\)` diverges: its last term has 1\.2 times the norm of the one before and the same "
        r"sign, so the inner Hessian has a negative eigenvalue and no `step_size` converges\. "
        r"Train the inner problem further, or use `ConjugateGradient\(damping=\.\.\.\)`\.$",
    ),
    "overflow": (
        Neumann(terms=600, step_size=3.0),
        symmetric(SPECTRUM),
        r"^`Neumann\(step_size=3\.0\)` diverges: its terms are nan or infinite\. Lower `step_size`, and look at",
    ),
    "Neumann on nan": (
        Neumann(step_size=0.1),
        NAN_MATRIX,
        r"^`Neumann\(step_size=0\.1\)` diverges: its terms are nan or infinite\. Lower `step_size`, and look at",
    ),
    "indefinite": (
        ConjugateGradient(damping=0.1),
        with_eigenvalue(-1.0),
        r"^`ConjugateGradient\(max_iter=20\)` stopped at a direction of curvature -\S+: the inner Hessian is not "
        r"positive definite\. Raise `damping`, now 0\.1, above its most negative eigenvalue\.$",
    ),
    "too few iterations": (
        ConjugateGradient(max_iter=3),
        symmetric(SPECTRUM),
        r"^`ConjugateGradient\(max_iter=3\)` reached a relative residual of 0\.\d+, not `tol=1e-06`\. "
        r"Raise `max_iter`, `tol` or `damping`\.$",
    ),
    "GMRES, too few iterations": (
        GMRES(max_iter=3),
        symmetric(SPECTRUM),
        r"^`GMRES\(max_iter=3, restart=20\)` reached a relative residual of 0\.\d+, not `tol=1e-06`\. "
        r"Raise `max_iter`, `restart` or `tol`\.$",
    ),
    "GMRES on nan": (
        GMRES(),
        NAN_MATRIX,
        r"^`GMRES\(max_iter=20, restart=20\)` met products that are nan or infinite\. Look at the inner loss",
    ),
    "conjugate gradients on nan": (
        ConjugateGradient(),
        NAN_MATRIX,
        r"^`ConjugateGradient\(max_iter=20\)` met products that are nan or infinite\. Look at the inner loss",
    ),
}


@pytest.mark.parametrize(("solver", "matrix", "message"), WARNINGS.values(), ids=WARNINGS)
def test_failure_is_reported_every_time_and_warned_about_once(
    solver: LinearSolver, matrix: Tensor, message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        first = solver.solve(LinearSystem(Spy(matrix), right_hand_side()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = solver.solve(LinearSystem(Spy(matrix), right_hand_side()))
    assert first.converged is False
    assert second.converged is False


@pytest.mark.parametrize("solver", [Neumann(step_size=0.1), ConjugateGradient(), GMRES()], ids=class_name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nan_products_are_not_hidden(solver: LinearSolver) -> None:
    assert tree.first_nonfinite(solver.solve(LinearSystem(Spy(NAN_MATRIX), right_hand_side())).value) is not None


WHOLE, POSITIVE, NOT_NEGATIVE = "a positive integer", "a positive number", "a non-negative number"
VALUE_ERRORS: list[tuple[type[LinearSolver], str, Any, str]] = [
    (Neumann, "terms", 0, WHOLE),
    (Neumann, "terms", 2.5, WHOLE),
    (Neumann, "step_size", 0.0, POSITIVE),
    (Neumann, "step_size", NAN, POSITIVE),
    (Neumann, "step_size", "1", POSITIVE),
    (ConjugateGradient, "max_iter", -1, WHOLE),
    (ConjugateGradient, "tol", 0, POSITIVE),
    (ConjugateGradient, "damping", -1.0, NOT_NEGATIVE),
    (Nystrom, "rank", True, WHOLE),
    (Nystrom, "rho", False, POSITIVE),
    (Identity, "scale", float("inf"), POSITIVE),
    (GMRES, "max_iter", 0, WHOLE),
    (GMRES, "restart", 1.0, WHOLE),
    (GMRES, "tol", -1, POSITIVE),
    (KFAC, "damping", 0, POSITIVE),
    (KFAC, "samples", 0, WHOLE),
    (KFAC, "seed", -1, "a non-negative integer"),
    (ConjugateGradient, "preconditioner", 3, "a solver that makes a preconditioner, such as `KFAC()`"),
]


@pytest.mark.parametrize(("solver", "name", "value", "expected"), VALUE_ERRORS)
def test_wrong_values_are_named(solver: type[LinearSolver], name: str, value: Any, expected: str) -> None:
    arguments = ({"step_size": 0.1} if solver is Neumann else {}) | {name: value}
    message = f"Expected `{solver.__name__}({name}=...)` to be {expected}, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        solver(**arguments)


COMMAND_LINE: list[tuple[type[LinearSolver], dict[str, Any]]] = [
    (Neumann, {"terms": 4, "step_size": 0.5}),
    (ConjugateGradient, {"max_iter": 5, "tol": 0.1, "damping": 0.2}),
    (Nystrom, {"rank": 3, "rho": 0.5, "seed": 1}),
    (Identity, {"scale": 2.0, "adapt": True}),
    (Dense, {}),
    (GMRES, {"max_iter": 9, "restart": 3, "tol": 0.1}),
    (KFAC, {"damping": 0.5, "samples": 2, "seed": 1}),
]


@pytest.mark.parametrize(("solver", "arguments"), COMMAND_LINE)
def test_the_command_line_can_build_it(solver: type[LinearSolver], arguments: dict[str, Any]) -> None:
    parser = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LinearSolver, "solver")
    path = f"lightning_bilevel.linear_solvers.{solver.__name__}"
    options = [f"--solver.{name}={str(value).lower()}" for name, value in arguments.items()]
    built = parser.instantiate(parser.parse_args([f"--solver={path}", *options])).solver
    assert type(built) is solver
    assert {name: getattr(built, name) for name in arguments} == arguments
