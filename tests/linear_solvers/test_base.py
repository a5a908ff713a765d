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
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import ConjugateGradient, Dense, Identity, LinearSolver, Neumann, Nystrom
from lightning_bilevel.tree import Params

M = 10
EYE = torch.eye(M, dtype=torch.float64)
SPECTRUM = torch.linspace(0.5, 4.0, M, dtype=torch.float64)
NAN = float("nan")

EVERY: dict[str, Callable[[], LinearSolver]] = {
    "Neumann": lambda: Neumann(terms=3, step_size=0.2),
    "ConjugateGradient": lambda: ConjugateGradient(max_iter=40),
    "Nystrom": lambda: Nystrom(rank=4),
    "Dense": Dense,
    "Identity": Identity,
}


def class_name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


every_solver = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


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
    return tree.flatten(solver.solve(Spy(matrix), b or right_hand_side()).value)


EXACT: dict[str, tuple[LinearSolver, float]] = {  # solver, what it adds to the diagonal
    "Neumann": (Neumann(terms=200, step_size=2 / 4.5), 0.0),
    "ConjugateGradient": (ConjugateGradient(max_iter=2 * M, tol=1e-12), 0.0),
    "ConjugateGradient, damped": (ConjugateGradient(tol=1e-12, damping=0.3), 0.3),
    "Nystrom": (Nystrom(rank=M, rho=0.1), 0.1),
    "Nystrom, rank above M": (Nystrom(rank=3 * M, rho=1e-4), 1e-4),
    "Dense": (Dense(), 0.0),
}


@pytest.mark.parametrize(("solver", "shift"), EXACT.values(), ids=EXACT)
def test_agrees_with_torch_linalg_solve(solver: LinearSolver, shift: float) -> None:
    matrix, b = symmetric(SPECTRUM), right_hand_side()
    expected = torch.linalg.solve(matrix + shift * EYE, tree.flatten(b))
    value = solver.solve(Spy(matrix), b).value
    assert {name: part.shape for name, part in value.items()} == {name: part.shape for name, part in b.items()}
    torch.testing.assert_close(tree.flatten(value), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_the_sum_of_explicit_powers(terms: int) -> None:
    matrix, b = symmetric(SPECTRUM), right_hand_side()
    contraction = EYE - 0.2 * matrix
    powers = sum(torch.linalg.matrix_power(contraction, k) for k in range(terms))
    expected = 0.2 * powers @ tree.flatten(b)
    torch.testing.assert_close(solve_flat(Neumann(terms, step_size=0.2), matrix), expected)


def test_identity_is_one_neumann_term() -> None:
    matrix = symmetric(SPECTRUM)
    one = solve_flat(Identity(scale=0.2), matrix)
    torch.testing.assert_close(one, solve_flat(Neumann(terms=1, step_size=0.2), matrix))
    assert Identity(adapt=True).adapt
    assert not Identity().adapt


PRODUCTS: list[tuple[LinearSolver, int]] = [
    (Neumann(terms=1, step_size=0.2), 0),
    (Neumann(terms=6, step_size=0.2), 5),
    (ConjugateGradient(tol=1e-9), M),  # as many as there are different eigenvalues
    (Nystrom(rank=4), 4),
    (Nystrom(rank=3 * M), M),
    (Dense(), M),
    (Identity(), 0),
]


@pytest.mark.parametrize(("solver", "products"), PRODUCTS, ids=class_name)
def test_takes_the_documented_number_of_products(solver: LinearSolver, products: int) -> None:
    spy = Spy(symmetric(SPECTRUM))
    assert solver.solve(spy, right_hand_side()).iterations == products
    assert spy.calls == products


def test_conjugate_gradient_stops_at_the_number_of_eigenvalues_and_reports_the_residual() -> None:
    matrix, b = symmetric(torch.tensor([1.0, 2.0, 3.0]).repeat(4)[:M].double()), right_hand_side()
    solution = ConjugateGradient(tol=1e-10).solve(Spy(matrix), b)
    assert (solution.converged, solution.iterations) == (True, 3)
    loose = ConjugateGradient(tol=0.1, damping=0.5).solve(Spy(matrix), b)
    flat = tree.flatten(b)
    residual = flat - (matrix + 0.5 * EYE) @ tree.flatten(loose.value)
    assert loose.residual is not None
    assert loose.residual <= 0.1
    torch.testing.assert_close(loose.residual, residual.norm() / flat.norm())


@every_solver
def test_zero_right_hand_side(make: Callable[[], LinearSolver]) -> None:
    solution = make().solve(Spy(symmetric(SPECTRUM)), tree.zeros_like(right_hand_side()))
    assert tree.norm(solution.value) == 0
    assert solution.converged in (None, True)
    assert solution.residual in (None, 0)


def test_conjugate_gradient_does_not_care_about_units() -> None:
    b = tree.map(lambda part: part.float() * 1e-15, right_hand_side())
    solution = ConjugateGradient().solve(Spy(symmetric(SPECTRUM).float()), b)
    assert (solution.converged, solution.iterations) == (True, M)


@every_solver
def test_mixed_dtypes_keep_their_names_shapes_and_dtypes(make: Callable[[], LinearSolver]) -> None:
    matrix, exact = symmetric(SPECTRUM), right_hand_side()
    dtypes = {"w": torch.bfloat16, "s": torch.float32, "b": torch.float64}
    b = {name: part.to(dtypes[name]) for name, part in exact.items()}
    seen = []

    def matvec(v: Params) -> Params:
        seen.append({name: part.dtype for name, part in v.items()})
        return Spy(matrix)(v)

    value = make().solve(matvec, b).value
    assert {name: part.dtype for name, part in value.items()} == dtypes
    assert all(types == dtypes for types in seen)
    expected = solve_flat(make(), matrix, exact)
    torch.testing.assert_close(tree.flatten(value), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_solver
def test_low_precision(make: Callable[[], LinearSolver], dtype: torch.dtype) -> None:
    matrix, b = symmetric(SPECTRUM), tree.map(lambda part: part.to(dtype), right_hand_side())
    value = make().solve(Spy(matrix), b).value
    torch.testing.assert_close(tree.flatten(value).double(), solve_flat(make(), matrix), rtol=0.05, atol=0.05)


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
        value = make().solve(matvec, b).value
    assert not any(part.requires_grad for part in value.values())
    torch.testing.assert_close(tree.flatten(value), solve_flat(make(), matrix))


def with_eigenvalue(value: float) -> Tensor:
    return symmetric(torch.cat([SPECTRUM[1:], torch.tensor([value], dtype=torch.float64)]))


NAN_MATRIX = torch.full((M, M), NAN, dtype=torch.float64)
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
        first = solver.solve(Spy(matrix), right_hand_side())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = solver.solve(Spy(matrix), right_hand_side())
    assert first.converged is False
    assert second.converged is False


@pytest.mark.parametrize("solver", [Neumann(step_size=0.1), ConjugateGradient()], ids=class_name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nan_products_are_not_hidden(solver: LinearSolver) -> None:
    assert tree.first_nonfinite(solver.solve(Spy(NAN_MATRIX), right_hand_side()).value) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lowest", [0.5, 0.0])
def test_neumann_is_silent_at_the_edge_of_its_assumption(lowest: float, dtype: torch.dtype) -> None:
    # Terms that keep their norm but for rounding, at α = 2/λ_max or in the null space of A, do not diverge.
    matrix, b = with_eigenvalue(lowest).to(dtype), tree.map(lambda part: part.to(dtype), right_hand_side())
    for terms in (2, 100, 1000, 1001):
        assert Neumann(terms, step_size=0.5).solve(Spy(matrix), b).converged is None


def test_conjugate_gradient_keeps_the_last_good_iterate() -> None:
    matrix, b = with_eigenvalue(-0.05), right_hand_side()
    with pytest.warns(UserWarning, match=r"^`ConjugateGradient\(max_iter=20\)` stopped"):
        stopped = ConjugateGradient().solve(Spy(matrix), b)
    assert stopped.iterations > 1
    with pytest.warns(UserWarning, match=r"reached a relative residual"):
        before = ConjugateGradient(max_iter=stopped.iterations - 1).solve(Spy(matrix), b)
    torch.testing.assert_close(stopped.value, before.value, rtol=0, atol=0)
    torch.testing.assert_close(stopped.residual, before.residual, rtol=0, atol=0)
    damped = ConjugateGradient(damping=0.2, tol=1e-12).solve(Spy(matrix), b)
    expected = torch.linalg.solve(matrix + 0.2 * EYE, tree.flatten(b))
    torch.testing.assert_close(tree.flatten(damped.value), expected)


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
    value = Nystrom(rank, rho=0.1).solve(Spy(with_eigenvalue(lowest)), b).value
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("matrix", [torch.ones(M, M).double(), torch.zeros(M, M).double(), with_eigenvalue(0.0)])
def test_dense_refuses_a_singular_matrix(matrix: Tensor, dtype: torch.dtype) -> None:
    b = tree.map(lambda part: part.to(dtype), right_hand_side())
    message = (
        r"^Cannot use `Dense` with a singular matrix\. This is because the smallest singular value of the inner "
        r"Hessian is \S+, the largest \S+\. Add weight decay to the inner loss, or use "
        r"`ConjugateGradient\(damping=\.\.\.\)`\.$"
    )
    with pytest.raises(MisconfigurationError, match=message):
        Dense().solve(Spy(matrix.to(dtype)), b)


@pytest.mark.parametrize("solver", [Dense(), Nystrom()], ids=class_name)
def test_decompositions_refuse_nan(solver: LinearSolver) -> None:
    message = rf"^Expected the Hessian products of `{class_name(solver)}` to be finite, got nan or inf\. Look at the "
    with pytest.raises(FloatingPointError, match=message):
        solver.solve(Spy(NAN_MATRIX), right_hand_side())


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
