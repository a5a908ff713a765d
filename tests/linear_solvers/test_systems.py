"""The parts of a linear system: start, preconditioner, inner product, symmetry, precision and complex numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_bilevel import tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import (
    GMRES,
    ConjugateGradient,
    Dense,
    Identity,
    LinearSolver,
    LinearSystem,
    Neumann,
    Nystrom,
)
from lightning_bilevel.tree import Params

SHAPES: dict[str, tuple[int, ...]] = {"w": (2, 3), "s": (), "b": (3,)}
M = 10
EYE = torch.eye(M, dtype=torch.float64)

MAKERS: dict[str, Callable[[], LinearSolver]] = {
    "Neumann": lambda: Neumann(terms=200, step_size=2 / 4.5),
    "ConjugateGradient": lambda: ConjugateGradient(max_iter=2 * M, tol=1e-12),
    "Nystrom": lambda: Nystrom(rank=2 * M, rho=1e-8),
    "Dense": Dense,
    "GMRES": lambda: GMRES(max_iter=2 * M, tol=1e-12),
    "Identity": lambda: Identity(scale=0.5),
}
ITERATIVE = ("Neumann", "ConjugateGradient", "GMRES")
EXACT = (*ITERATIVE, "Nystrom", "Dense")


class HalfAndHalf:
    """The product of two vectors as two processes would sum it, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, a: Params, b: Params) -> Tensor:
        self.calls += 1
        self.dtypes |= {value.dtype for value in [*a.values(), *b.values()]}
        first, second = (
            tree.dot(*({name: value.reshape(-1)[part] for name, value in vector.items()} for vector in (a, b)))
            for part in (slice(0, None, 2), slice(1, None, 2))
        )
        return first + second


flat_or_by_name = pytest.mark.parametrize("make_dot", [lambda: tree.dot, HalfAndHalf], ids=["flat", "by name"])


def solvers(*names: str) -> Any:
    return pytest.mark.parametrize("make", [MAKERS[name] for name in names], ids=names)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vector(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    return tree.unflatten(
        draw(M, seed=seed, dtype=dtype), {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    )


def definite(first: float = 0.5, last: float = 4.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a symmetric or Hermitian matrix with eigenvalues in an interval, always of the same vectors."""
    q = torch.linalg.qr(draw(M, M, seed=0, dtype=dtype)).Q
    return q @ torch.diag(torch.linspace(first, last, M).to(dtype)) @ q.mH


def contraction(radius: float = 0.6) -> Tensor:
    """Return a matrix that is not symmetric, of spectral radius ``radius``."""
    matrix = draw(M, M, seed=2)
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().max())


INVERSE = definite(1.0, 0.2)
"""Near the inverse of ``definite()``: their product has eigenvalues from 0.5 to 1.4."""


class Product:
    """v ↦ A v on trees, which notes what it gets and returns other names first."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.calls = 0
        self.dtypes: set[tuple[torch.dtype, ...]] = set()

    def __call__(self, v: Params) -> Params:
        self.calls += 1
        assert {name: tuple(value.shape) for name, value in v.items()} == SHAPES
        assert not any(value.requires_grad for value in v.values())
        self.dtypes.add(tuple(v[name].dtype for name in SHAPES))
        ordered = {name: v[name] for name in SHAPES}
        image = tree.unflatten(self.matrix @ tree.flatten(ordered).to(self.matrix.dtype), ordered)
        return {name: image[name] for name in reversed(SHAPES)}


def close(value: Params, expected: Tensor | Params, tolerance: float = 1e-6) -> None:
    """Assert equality with a tree, or with a vector in the order of ``value``."""
    expected = tree.unflatten(expected, value) if isinstance(expected, Tensor) else expected
    torch.testing.assert_close(value, {name: expected[name] for name in value}, rtol=tolerance, atol=tolerance)


# --- x0 ---


@flat_or_by_name
def test_conjugate_gradients_take_fewer_products_from_a_good_start(make_dot: Callable[[], Any]) -> None:
    matrix, b = definite(), vector(1)
    exact = tree.unflatten(torch.linalg.solve(matrix, tree.flatten(b)), b)
    cold, warm = Product(matrix), Product(matrix)
    solver = ConjugateGradient(tol=1e-4)
    first = solver.solve(LinearSystem(cold, b, dot=make_dot()))
    second = solver.solve(LinearSystem(warm, b, tree.add(exact, vector(3), alpha=1e-3), dot=make_dot()))
    assert (first.iterations, second.iterations) == (cold.calls, warm.calls)
    assert warm.calls <= cold.calls - 2
    assert second.converged
    close(second.value, exact, 1e-3)
    close(first.value, exact, 1e-3)
    anywhere = LinearSystem(cold, b, vector(3), dot=make_dot())
    close(ConjugateGradient(tol=1e-12).solve(anywhere).value, exact)


def test_a_start_that_is_the_solution_takes_one_product() -> None:
    product, exact = Product(definite()), vector(3)
    solution = ConjugateGradient().solve(LinearSystem(product, product(exact), exact))
    assert (solution.converged, solution.iterations) == (True, 1)
    close(solution.value, exact, 1e-15)


def test_the_product_of_the_start_is_one_of_the_most() -> None:
    product = Product(definite())
    with pytest.warns(UserWarning, match=r"^`ConjugateGradient\(max_iter=3\)` reached a relative residual"):
        solution = ConjugateGradient(max_iter=3).solve(LinearSystem(product, vector(1), vector(3)))
    assert solution.iterations == product.calls == 3
    residual = tree.norm(tree.sub(vector(1), product(solution.value))) / tree.norm(vector(1))
    torch.testing.assert_close(solution.residual, residual)


@pytest.mark.parametrize("precondition", [None, Product(torch.diag(torch.linspace(0.5, 1, M).double()))])
def test_a_neumann_series_goes_on_where_it_ended(precondition: Product | None) -> None:
    product, b = Product(definite()), vector(1)
    system = LinearSystem(product, b, precondition=precondition)
    half = Neumann(terms=4, step_size=0.2).solve(system)
    product.calls = 0
    rest = Neumann(terms=5, step_size=0.2).solve(system._replace(x0=half.value))
    assert rest.iterations == product.calls == 5
    close(rest.value, Neumann(terms=9, step_size=0.2).solve(system).value, 1e-14)


@solvers("Nystrom", "Dense", "Identity")
def test_solvers_without_iterations_do_not_use_a_start(make: Callable[[], LinearSolver]) -> None:
    product = Product(definite())
    without, given = (make().solve(LinearSystem(product, vector(1), x0)).value for x0 in (None, vector(3)))
    close(given, without, 0)


@solvers(*MAKERS)
def test_zero_is_the_answer_to_zero_from_any_start(make: Callable[[], LinearSolver]) -> None:
    solution = make().solve(LinearSystem(Product(definite()), tree.zeros_like(vector(1)), vector(3)))
    assert tree.norm(solution.value) == 0
    assert solution.converged in (None, True)


@solvers(*ITERATIVE)
def test_the_start_may_come_in_another_order_and_dtype(make: Callable[[], LinearSolver]) -> None:
    x0 = {name: vector(3)[name].float() for name in reversed(SHAPES)}
    value = make().solve(LinearSystem(Product(definite()), vector(1), x0)).value
    assert {name: part.dtype for name, part in value.items()} == dict.fromkeys(SHAPES, torch.float64)
    close(value, torch.linalg.solve(definite(), tree.flatten(vector(1))))


# --- precondition ---


def test_conjugate_gradients_with_the_inverse_take_one_product() -> None:
    matrix, b = definite(1e-3, 1e3), vector(1)
    precondition = Product(torch.linalg.inv(matrix))
    solution = ConjugateGradient(tol=1e-9).solve(LinearSystem(Product(matrix), b, precondition=precondition))
    assert (solution.converged, solution.iterations) == (True, 1)
    close(solution.value, torch.linalg.solve(matrix, tree.flatten(b)), 1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("x0", [None, vector(3)], ids=["cold", "warm"])
def test_a_preconditioner_saves_products_and_keeps_the_solution(x0: Params | None, damping: float) -> None:
    scales = torch.logspace(-2, 2, M, dtype=torch.float64)
    matrix = scales[:, None] * definite(1.0, 2.0) * scales  # of condition number 1e8
    shifted = matrix + damping * EYE
    system = LinearSystem(Product(matrix), vector(1), x0)
    solver = ConjugateGradient(max_iter=100, tol=1e-8, damping=damping)
    plain = solver.solve(system)
    better = solver.solve(system._replace(precondition=Product(torch.diag(1 / shifted.diagonal()))))
    assert better.converged
    assert better.iterations <= M + 2 < plain.iterations
    close(Product(shifted)(better.value), vector(1), 1e-7)


@pytest.mark.parametrize("x0", [None, vector(3)], ids=["cold", "warm"])
@pytest.mark.parametrize("terms", [1, 2, 5])
def test_a_preconditioned_neumann_series_is_the_sum_of_explicit_powers(terms: int, x0: Params | None) -> None:
    matrix, inverse, b = definite(), INVERSE, vector(1)
    step = EYE - 0.3 * matrix @ inverse
    start = torch.zeros(M, dtype=torch.float64) if x0 is None else tree.flatten(x0)
    residual = tree.flatten(b) - matrix @ start
    total = sum(torch.linalg.matrix_power(step, k) @ residual for k in range(terms))
    preconditioner = Product(inverse)
    solution = Neumann(terms, step_size=0.3).solve(LinearSystem(Product(matrix), b, x0, preconditioner))
    close(solution.value, start + 0.3 * inverse @ total, 1e-12)
    assert solution.iterations == terms - (x0 is None)  # that of x0, or none for the first term
    assert preconditioner.calls == terms


@pytest.mark.parametrize("adapt", [False, True])
def test_identity_is_a_multiple_of_the_preconditioner(adapt: bool) -> None:
    inverse, product = INVERSE, Product(definite())
    system = LinearSystem(product, vector(1), precondition=Product(inverse))
    close(Identity(scale=0.5, adapt=adapt).solve(system).value, 0.5 * inverse @ tree.flatten(vector(1)), 1e-14)
    assert product.calls == 0


def test_identity_refuses_to_adapt_to_nothing() -> None:
    message = (
        r"^Cannot use `Identity\(adapt=True\)` with a linear system that has no preconditioner\. This is because there "
        r"is no inner optimizer whose preconditioner could be taken\. Use `Identity\(scale=\.\.\.\)`"
    )
    with pytest.raises(MisconfigurationError, match=message):
        Identity(adapt=True).solve(LinearSystem(Product(definite()), vector(1)))


@solvers("Nystrom", "Dense")
def test_decompositions_do_not_use_a_preconditioner(make: Callable[[], LinearSolver]) -> None:
    system, preconditioner = LinearSystem(Product(definite()), vector(1)), Product(INVERSE)
    close(make().solve(system._replace(precondition=preconditioner)).value, make().solve(system).value, 0)
    assert preconditioner.calls == 0


def test_conjugate_gradients_say_that_a_preconditioner_is_not_positive_definite() -> None:
    system = LinearSystem(Product(definite()), vector(1), precondition=Product(-EYE))
    message = (
        r"^`ConjugateGradient\(max_iter=20\)` stopped at a residual r with rᵀPr = -1: the system's preconditioner P is "
        r"not positive definite\. Leave it out\.$"
    )
    with pytest.warns(UserWarning, match=message):
        solution = ConjugateGradient().solve(system)
    assert (solution.converged, solution.iterations) == (False, 0)
    assert tree.norm(solution.value) == 0


# --- dot ---


@pytest.mark.parametrize("x0", [None, vector(3)], ids=["cold", "warm"])
@pytest.mark.parametrize("precondition", [None, Product(INVERSE)], ids=["plain", "preconditioned"])
@solvers(*MAKERS)
def test_products_of_vectors_are_those_of_the_system(
    make: Callable[[], LinearSolver], precondition: Product | None, x0: Params | None
) -> None:
    dot, product = HalfAndHalf(), Product(definite())
    solution = make().solve(LinearSystem(product, vector(1), x0, precondition, dot))
    usual = make().solve(LinearSystem(product, vector(1), x0, precondition))
    close(solution.value, usual.value, 1e-10)
    steps = solution.iterations - (x0 is not None)
    weights = 1 if precondition is None else 2
    of_gmres = 1 + steps * (steps + 3)
    calls = {Neumann: 3, ConjugateGradient: weights + (1 + weights) * steps, GMRES: of_gmres}.get(type(make()))
    assert dot.calls == (0 if calls is None else calls + 1)  # one for ‖b‖


class Rank:
    """One of two processes, each with its half of every vector."""

    def __init__(self, number: int, barrier: Barrier, board: list[Any]) -> None:
        self.number, self.barrier, self.board = number, barrier, board

    def gather(self, own: Any) -> list[Any]:
        self.board[self.number] = own
        self.barrier.wait(10)
        both = list(self.board)
        self.barrier.wait(10)
        return both

    def part(self, flat: Tensor) -> Params:
        own = flat[self.number * M // 2 : (self.number + 1) * M // 2]
        return {"w": own[:2].reshape(1, 2), "b": own[2:]}

    def dot(self, a: Params, b: Params) -> Tensor:
        first, second = self.gather(tree.dot(a, b))
        return first + second

    def product(self, matrix: Tensor) -> Callable[[Params], Params]:
        return lambda v: self.part(matrix @ torch.cat(self.gather(tree.flatten(v))))


@pytest.mark.parametrize("precondition", [None, INVERSE], ids=["plain", "preconditioned"])
@solvers(*ITERATIVE)
def test_two_processes_solve_one_system(make: Callable[[], LinearSolver], precondition: Tensor | None) -> None:
    assert not make().needs_whole_vectors
    barrier, board, b, x0 = Barrier(2), [None, None], draw(M, seed=1), draw(M, seed=3)

    def solve(number: int) -> tuple[Tensor, int]:
        rank = Rank(number, barrier, board)
        system = LinearSystem(rank.product(definite()), rank.part(b), rank.part(x0), dot=rank.dot)
        if precondition is not None:
            system = system._replace(precondition=rank.product(precondition))
        solution = make().solve(system)
        return tree.flatten(solution.value), solution.iterations

    with ThreadPoolExecutor(2) as pool:
        (first, products), (second, others) = pool.map(solve, range(2))
    assert products == others
    close({"x": torch.cat([first, second])}, torch.linalg.solve(definite(), b))


# --- symmetric ---


def fixed_point(jacobian: Tensor) -> LinearSystem:
    return LinearSystem(Product(torch.eye(len(jacobian)).double() - jacobian.T), vector(1), symmetric=False)


@pytest.mark.parametrize(
    "solver", [Neumann(terms=80, step_size=1.0), Dense(), GMRES()], ids=["Neumann", "Dense", "GMRES"]
)
@pytest.mark.parametrize("x0", [None, vector(3)], ids=["cold", "warm"])
def test_the_system_of_a_fixed_point(solver: LinearSolver, x0: Params | None) -> None:
    jacobian = contraction()
    value = solver.solve(fixed_point(jacobian)._replace(x0=x0)).value
    close(value, torch.linalg.solve(EYE - jacobian.T, tree.flatten(vector(1))))


@pytest.mark.parametrize("solver", [ConjugateGradient(), Nystrom()], ids=["ConjugateGradient", "Nystrom"])
def test_solvers_that_need_a_symmetric_matrix_refuse_others(solver: LinearSolver) -> None:
    name = type(solver).__name__
    message = (
        rf"^Cannot use `{name}` with a linear system that is not symmetric\. This is because `{name}` assumes A = Aᵀ, "
        r"which the system of a fixed point, .*, does not have\. Use `GMRES\(\)`, `Neumann\("
    )
    system = fixed_point(contraction())
    with pytest.raises(MisconfigurationError, match=message):
        solver.solve(system)
    assert system.matvec.calls == 0  # type: ignore[attr-defined]


def turning(rate: float, stretch: float) -> Tensor:
    """Return a matrix whose every second power is −rate² I, and whose powers grow and fall by turns on the way."""
    block = torch.tensor([[0.0, -rate * stretch], [rate / stretch, 0.0]], dtype=torch.float64)
    return torch.block_diag(*[block] * (M // 2))


@pytest.mark.parametrize("terms", [50, 51])
def test_a_series_that_grows_on_the_way_does_not_diverge(terms: int) -> None:
    system = fixed_point(turning(0.9, stretch=5.0))
    solution = Neumann(terms, step_size=1.0).solve(system)
    assert solution.converged is None
    assert tree.norm(tree.sub(system.b, system.matvec(solution.value))) < 0.1 * tree.norm(system.b)


def test_growth_of_the_last_term_alone_counts_where_the_matrix_is_symmetric() -> None:
    system = fixed_point(turning(0.9, stretch=5.0))._replace(symmetric=True)  # not true
    with pytest.warns(UserWarning, match=r"diverges: its last term has \S+ times the norm of the one before"):
        assert False in [Neumann(terms, step_size=1.0).solve(system).converged for terms in (50, 51)]


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_series_that_ends_above_its_start_says_so(preconditioned: bool) -> None:
    system = fixed_point(contraction(1.3))
    if preconditioned:
        system = LinearSystem(Product(definite()), vector(1), precondition=Product(EYE))
    message = (
        r"^`Neumann\(step_size=1\.0\)` diverges: its last term has \S+ times the norm of the first\. "
        r"Lower `step_size`, or raise `terms` if they fall later\.$"
    )
    with pytest.warns(UserWarning, match=message):
        assert Neumann(terms=40, step_size=1.0).solve(system).converged is False


def test_dense_refuses_a_fixed_point_that_is_not_isolated() -> None:
    message = (
        r"^Cannot use `Dense` with a singular matrix\. This is because the smallest singular value of I − ∂Ω/∂θ is "
        r"\S+, the largest \S+\. Use `Neumann\(terms=K, step_size=1\.0\)`, the derivative of K iterations\.$"
    )
    with pytest.raises(MisconfigurationError, match=message):
        Dense().solve(fixed_point(EYE))


# --- precision ---


@flat_or_by_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@solvers(*MAKERS)
def test_functions_see_the_dtypes_of_b_and_iterations_are_wider(
    make: Callable[[], LinearSolver], dtype: torch.dtype, make_dot: Callable[[], Any]
) -> None:
    def low(a: Params) -> Params:
        return {name: value.to(dtype) for name, value in a.items()}

    solver = {
        ConjugateGradient: ConjugateGradient(tol=1e-2),
        Nystrom: Nystrom(rank=4, rho=0.1),
        GMRES: GMRES(tol=1e-2),
    }.get(type(make()), make())
    dot, product, precondition = make_dot(), Product(definite()), Product(EYE / 2)
    value = solver.solve(LinearSystem(product, low(vector(1)), low(vector(3)), precondition, dot)).value
    assert {part.dtype for part in value.values()} == {dtype}
    assert product.dtypes | precondition.dtypes == {(dtype,) * 3}
    if isinstance(dot, HalfAndHalf):
        assert dot.dtypes <= {torch.float32}
    exact = solver.solve(LinearSystem(Product(definite()), vector(1), vector(3), Product(EYE / 2))).value
    close(tree.map(Tensor.double, value), exact, 0.05)


@flat_or_by_name
@solvers("Neumann", "Dense")
def test_mixed_dtypes_compute_in_the_widest(make: Callable[[], LinearSolver], make_dot: Callable[[], Any]) -> None:
    dtypes = {"w": torch.bfloat16, "s": torch.float32, "b": torch.float64}
    b = {name: value.to(dtypes[name]) for name, value in vector(1).items()}
    product = Product(torch.diag(torch.linspace(0.5, 4, M).double()))  # what bfloat16 loses stays in its part
    value = make().solve(LinearSystem(product, b, dot=make_dot())).value
    assert {name: part.dtype for name, part in value.items()} == dtypes
    assert product.dtypes == {tuple(dtypes.values())}
    torch.testing.assert_close(value["b"], b["b"] / product.matrix.diagonal()[-3:], rtol=1e-8, atol=1e-8)


# --- complex numbers ---


@flat_or_by_name
@pytest.mark.parametrize("x0", [None, vector(3, torch.complex128)], ids=["cold", "warm"])
@solvers(*EXACT)
def test_a_hermitian_system(make: Callable[[], LinearSolver], x0: Params | None, make_dot: Callable[[], Any]) -> None:
    matrix, b = definite(dtype=torch.complex128), vector(1, torch.complex128)
    product = Product(matrix)
    solution = make().solve(LinearSystem(product, b, x0, dot=make_dot()))
    assert product.dtypes == {(torch.complex128,) * 3}
    close(solution.value, torch.linalg.solve(matrix, tree.flatten(b)))
    if isinstance(make(), Dense):
        assert solution.iterations == 2 * M
    preconditioned = make().solve(
        LinearSystem(product, b, x0, Product(definite(1.0, 0.2, torch.complex128)), make_dot())
    )
    close(preconditioned.value, solution.value)


@flat_or_by_name
@solvers(*ITERATIVE, "Dense")
def test_complex_numbers_keep_their_precision(make: Callable[[], LinearSolver], make_dot: Callable[[], Any]) -> None:
    matrix, b = definite(dtype=torch.complex64), vector(1, torch.complex64)
    solver = make() if not isinstance(make(), ConjugateGradient) else ConjugateGradient(tol=1e-5)
    value = solver.solve(LinearSystem(Product(matrix), b, dot=make_dot())).value
    close(value, torch.linalg.solve(matrix, tree.flatten(b)), 1e-4)


def hessian(theta: Params) -> Callable[[Params], Params]:
    """Return products with the Hessian of a loss of complex and real parameters: not linear over complex numbers."""
    curved, hermitian = 0.2 * draw(4, 4, seed=5, dtype=torch.complex128), definite(2.0, 3.0, torch.complex128)[:4, :4]
    mixed = 0.3 * draw(4, 3, seed=6, dtype=torch.complex128)
    leaves = tree.leaves(theta)
    z, x = leaves["z"], leaves["x"]
    with torch.enable_grad():
        loss = (z.conj() @ hermitian @ z + z @ curved @ z + z @ mixed @ x.to(z.dtype)).real + 2 * x.square().sum()
        gradient = tree.grad(loss, leaves, create_graph=True)

    def product(v: Params) -> Params:
        outputs, inputs, vectors = gradient.values(), leaves.values(), [v[name] for name in leaves]
        return tree.like(leaves, torch.autograd.grad(list(outputs), list(inputs), vectors, retain_graph=True))

    return product


@flat_or_by_name
@solvers(*EXACT)
def test_the_hessian_of_a_loss_of_real_and_complex_parameters(
    make: Callable[[], LinearSolver], make_dot: Callable[[], Any]
) -> None:
    b = {"x": draw(3, seed=1), "z": draw(4, seed=2, dtype=torch.complex128)}  # an odd number of real ones first
    product = hessian(b)
    rotated = product({"x": b["x"] * 0, "z": 1j * b["z"]})["z"]
    assert not torch.allclose(rotated, 1j * product({"x": b["x"] * 0, "z": b["z"]})["z"])
    solver = make() if not isinstance(make(), Neumann) else Neumann(terms=400, step_size=0.1)
    value = solver.solve(LinearSystem(product, b, dot=make_dot())).value
    assert {name: part.dtype for name, part in value.items()} == {"x": torch.float64, "z": torch.complex128}
    close(product(value), b)


def test_a_slope_is_the_product_of_gradient_and_direction() -> None:
    theta = {"z": draw(4, seed=1, dtype=torch.complex128), "x": draw(3, seed=2)}
    v = {"z": draw(4, seed=3, dtype=torch.complex128), "x": draw(3, seed=4)}

    def loss(a: Params) -> Tensor:
        return (a["z"].sin() * a["x"].sum()).abs().square().sum()

    leaves = tree.leaves(theta)
    gradient = tree.grad(loss(leaves), leaves)
    slope = torch.func.jvp(loss, (theta,), (v,))[1]
    torch.testing.assert_close(tree.dot(gradient, v), slope)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rows = tree.outer_product(weights, v)
    torch.testing.assert_close(tree.rows_dot(rows, gradient), weights * slope)
    close(tree.combine(weights, rows), tree.scale(v, weights.square().sum()), 1e-14)
    torch.testing.assert_close(tree.norm(v), tree.dot(v, v).sqrt())


# --- stated facts ---


def test_facts_of_the_solvers() -> None:
    stacking, symmetric, whole, wants = (
        [name for name, make in MAKERS.items() if getattr(make(), fact)]
        for fact in ("supports_stacking", "needs_symmetric", "needs_whole_vectors", "wants_preconditioner")
    )
    assert stacking == ["Neumann", "Identity"]
    assert symmetric == ["ConjugateGradient", "Nystrom"]
    assert whole == ["Nystrom", "Dense"]
    assert wants == []
    assert Identity(adapt=True).wants_preconditioner


@pytest.mark.parametrize(
    ("solver", "stacks"),
    [(Neumann(terms=3, step_size=0.2), True), (Identity(0.5), True), (ConjugateGradient(tol=0.2), False)],
    ids=["Neumann", "Identity", "ConjugateGradient"],
)
@flat_or_by_name
def test_solvers_that_support_stacking_solve_block_by_block(
    solver: LinearSolver, stacks: bool, make_dot: Callable[[], Any]
) -> None:
    blocks, starts = [definite(), definite(1.0, 2.0)], [vector(3), vector(4)]
    sides = [vector(1), tree.scale(vector(2), 30.0)]

    def both(v: Params) -> Params:
        return tree.stack([Product(block)(tree.index(v, i)) for i, block in enumerate(blocks)])

    stacked = solver.solve(LinearSystem(both, tree.stack(sides), tree.stack(starts), dot=make_dot())).value
    alone = [
        solver.solve(LinearSystem(Product(block), b, x0, dot=make_dot())).value
        for block, b, x0 in zip(blocks, sides, starts, strict=True)
    ]
    error = max(tree.norm(tree.sub(tree.index(stacked, i), value)) for i, value in enumerate(alone))
    assert (error < 1e-12) == stacks


class Synchronizations(TorchFunctionMode):
    """Counts what makes the program wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def synchronizations() -> Iterator[Synchronizations]:
    with Synchronizations() as mode:
        yield mode


@flat_or_by_name
@pytest.mark.parametrize("x0", [None, vector(3)], ids=["cold", "warm"])
def test_documented_number_of_synchronizations(
    synchronizations: Synchronizations, x0: Params | None, make_dot: Callable[[], Any]
) -> None:
    for solver in (Neumann(terms=7, step_size=0.2), ConjugateGradient(max_iter=40, tol=1e-9)):
        system = LinearSystem(Product(definite()), vector(1), x0, Product(EYE), make_dot())
        synchronizations.counts.clear()
        solution = solver.solve(system)
        steps = solution.iterations - (x0 is not None) + 1 if isinstance(solver, ConjugateGradient) else 1
        assert synchronizations.counts == {"tolist": steps}


def test_a_warning_leaves_the_solver_as_it_was() -> None:
    system = LinearSystem(Product(-definite()), vector(1))
    solver, other = ConjugateGradient(), ConjugateGradient()
    with pytest.warns(UserWarning, match="not positive definite"):
        solver.solve(system)
    assert vars(solver) == vars(other)
    with pytest.warns(UserWarning, match="not positive definite"):  # one warning an object
        other.solve(system)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver.solve(system)
