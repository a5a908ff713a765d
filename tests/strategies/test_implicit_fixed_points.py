"""The implicit gradient belongs to the map that is iterated: closed forms, and back-propagation through long runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    FSLA,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    BilevelModule,
    Episode,
    EpisodeLoader,
    ImplicitGradient,
    ReverseUnroll,
    RMSprop,
    hypergradient,
    tree,
)
from lightning_bilevel.calculus import inner_step, run
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.linear_solvers import ConjugateGradient, Dense, Identity, LinearSolver, Neumann, Nystrom
from lightning_bilevel.problem import Carry, InnerState
from lightning_bilevel.tree import Params
from tests.support.fits import Before
from tests.support.modules import listed, trainer
from tests.support.problems import DIFFERENCE, Mlp, RidgeBlackBox, RidgeSolver, assert_close, draw, episodes
from tests.support.seeds import call_of

NONE = Episode([None], None)
ROWS, SIZE = 12, 3
Make = Callable[["Weighted"], Any]


class Weighted(BilevelModule):
    """Least squares with learned weights of the rows, two parameters and an inner optimizer of the test's choice.

    g = mean eᵖ (Xθ + b − y)², and −g with ``sign=-1``; f is that of other rows, without weights. A batch scales y.
    """

    def __init__(self, optimizer: Make, inner_steps: int = 600, sign: float = 1.0, **options: Any) -> None:
        super().__init__(inner_steps, **{"inner_start": "reset", **options})
        self.x, self.y, self.xv, self.yv = (draw(*s, seed=i) for i, s in enumerate([(ROWS, SIZE), (ROWS,)] * 2))
        self.theta, self.b = nn.Parameter(draw(SIZE, seed=7)), nn.Parameter(draw(seed=8))
        self.p = nn.Parameter(0.3 * draw(ROWS, seed=9))
        self.log_decay = nn.Parameter(torch.tensor([-1.0, -2.0], dtype=torch.float64))
        self.optimizer, self.sign = optimizer, sign

    def inner_parameters(self):
        return [self.theta, self.b]

    def inner_loss(self, batch):
        y = self.y if batch is None else self.y * batch
        return self.sign * (self.p.exp() * (self.x @ self.theta + self.b - y).square()).mean()

    def outer_loss(self, batch):
        return (self.xv @ self.theta + self.b - self.yv).square().mean() + 1e-3 * self.log_decay.square().sum()

    def configure_inner_optimizer(self):
        return self.optimizer(self)

    def configure_optimizers(self):
        return torch.optim.SGD([self.p, self.log_decay], lr=0.0)

    def closed_form(self, decay: Callable[[Tensor], tuple[Any, Any]]) -> Params:
        """Return ∇h at the minimum of g + ½ decay θ² + ½ decay b², each a function of the learned decays."""
        p, log_decay = (value.detach().requires_grad_() for value in (self.p, self.log_decay))
        x = torch.cat([self.x, torch.ones(ROWS, 1, dtype=torch.float64)], dim=1)
        of_theta, of_b = (torch.as_tensor(value, dtype=torch.float64) for value in decay(log_decay))
        matrix = 2 * (x.T * p.exp()) @ x / ROWS + torch.cat([of_theta.expand(SIZE), of_b.reshape(1)]).diag()
        best = torch.linalg.solve(matrix, 2 * x.T @ (p.exp() * self.y) / ROWS)
        value = (self.xv @ best[:SIZE] + best[SIZE] - self.yv).square().mean() + 1e-3 * log_decay.square().sum()
        return dict(zip(["p", "log_decay"], torch.autograd.grad(value, (p, log_decay)), strict=True))


def learned(module: Weighted) -> dict[str, Tensor]:
    return {"theta": module.log_decay[0].exp(), "*": module.log_decay[1].exp()}


def constant(log_decay: Tensor) -> tuple[float, float]:
    return 0.6, 0.6


def of_theta_only(log_decay: Tensor) -> tuple[float, float]:
    return 0.6, 0.0


def per_parameter(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    return log_decay[0].exp(), log_decay[1].exp()


def in_groups(module: Weighted) -> Any:
    return torch.optim.SGD([{"params": [module.theta], "weight_decay": 0.6}, {"params": [module.b]}], lr=0.15)


SHAPED = {"theta": torch.full((SIZE,), 0.6, dtype=torch.float64), "b": torch.tensor([0.6], dtype=torch.float64)}
COUPLED: dict[str, tuple[Make, Any, float]] = {  # optimizer, its decay as a function of the learned one, sign of g
    "SGD": (lambda m: SGD(0.15, weight_decay=0.6), constant, 1.0),
    "momentum": (lambda m: SGD(0.1, momentum=0.5, weight_decay=0.6), constant, 1.0),
    "Adam": (lambda m: Adam(0.2, eps=1.0, weight_decay=0.6), constant, 1.0),
    "RMSprop": (lambda m: RMSprop(0.2, eps=1.0, weight_decay=0.6), constant, 1.0),
    "Adagrad": (lambda m: Adagrad(0.5, eps=1.0, weight_decay=0.6), constant, 1.0),
    "a tensor": (lambda m: SGD(0.15, weight_decay=torch.tensor(0.6, dtype=torch.float64)), constant, 1.0),
    "shaped": (lambda m: SGD(0.15, weight_decay=SHAPED), constant, 1.0),
    "of one": (lambda m: SGD(0.15, weight_decay={"b": 0, "*": 0.6}), of_theta_only, 1.0),
    "learned": (lambda m: SGD(0.15, weight_decay=learned(m)), per_parameter, 1.0),
    "learned, Adam": (lambda m: Adam(0.2, eps=1.0, weight_decay=learned(m)), per_parameter, 1.0),
    "torch": (lambda m: torch.optim.SGD(m.inner_parameters(), 0.15, weight_decay=0.6), constant, 1.0),
    "torch, groups": (in_groups, of_theta_only, 1.0),
    "torch, Adam": (lambda m: torch.optim.Adam(m.inner_parameters(), 0.2, eps=1.0, weight_decay=0.6), constant, 1.0),
    "upwards": (lambda m: SGD(0.15, maximize=True), lambda log_decay: (0.0, 0.0), -1.0),
    "upwards, decay": (lambda m: SGD(0.15, weight_decay=0.6, maximize=True), constant, -1.0),
    "upwards, learned": (lambda m: Adam(0.2, eps=1.0, weight_decay=learned(m), maximize=True), per_parameter, -1.0),
}
SOLVERS: dict[str, tuple[LinearSolver, float]] = {
    "Dense": (Dense(), 1e-8),
    "CG": (ConjugateGradient(tol=1e-13), 1e-8),
    "Neumann": (Neumann(terms=600, step_size=0.15), 1e-8),
    "Nystrom": (Nystrom(rank=SIZE + 1, rho=1e-8), 1e-5),  # rounding is magnified by 1/ρ
}
every_coupled = pytest.mark.parametrize(("optimizer", "decay", "sign"), COUPLED.values(), ids=COUPLED)
every_solver = pytest.mark.parametrize(("solver", "rtol"), SOLVERS.values(), ids=SOLVERS)


# --- Gradients: decay and sign ---


@every_solver
@every_coupled
def test_exact_at_the_end_of_a_long_run(
    optimizer: Make, decay: Any, sign: float, solver: LinearSolver, rtol: float
) -> None:
    module = Weighted(optimizer, sign=sign)
    found = hypergradient(module, ImplicitGradient(solver), NONE)
    assert_close(found.grads, module.closed_form(decay), rtol)
    assert found.metrics["inner_residual"] < 1e-8


@every_coupled
def test_unrolling_a_long_run_agrees(optimizer: Make, decay: Any, sign: float) -> None:
    module = Weighted(optimizer, sign=sign)
    assert_close(hypergradient(module, ReverseUnroll(), NONE).grads, module.closed_form(decay), 1e-7)


@every_coupled
def test_three_episodes_stacked_are_the_loop(optimizer: Make, decay: Any, sign: float) -> None:
    batch = [Episode([draw(seed=20 + i)], None) for i in range(3)]
    strategy = ImplicitGradient(Neumann(terms=7, step_size=0.1))
    each = [hypergradient(Weighted(optimizer, 5, sign), strategy, episode).grads for episode in batch]
    mean = {name: torch.stack([grads[name] for grads in each]).mean(0) for name in each[0]}
    for size in (None, 2, 1):
        module = Weighted(optimizer, 5, sign, episode_chunk_size=size)
        assert_close(hypergradient(module, strategy, batch).grads, mean, 1e-10)


def test_shaped_decays_of_stacked_episodes_meet_their_entries() -> None:
    """As many episodes as entries, so that a decay along the wrong dimension would not be noticed by its shape."""
    entries = torch.linspace(0.1, 2.0, SIZE, dtype=torch.float64)
    batch = [Episode([draw(seed=20 + i)], None) for i in range(SIZE)]
    strategy = ImplicitGradient(Neumann(terms=7, step_size=0.1))

    def optimizer(module: Weighted) -> SGD:
        return SGD(0.1, weight_decay={"theta": entries * module.log_decay[0].exp(), "*": 0.1})

    each = [hypergradient(Weighted(optimizer, 5), strategy, episode).grads for episode in batch]
    mean = {name: torch.stack([grads[name] for grads in each]).mean(0) for name in each[0]}
    assert_close(hypergradient(Weighted(optimizer, 5), strategy, batch).grads, mean, 1e-10)


def toy(optimizer: InnerOptimizer, steps: int, sign: float = 1.0) -> BilevelModule:
    """g = ± (θ − φ)²/2, f = (θ − 3)²/2 at φ = 1, of ../shared/FIELD.md, section 5."""

    class Toy(BilevelModule):
        def __init__(self) -> None:
            super().__init__(steps, inner_start="reset")
            self.theta, self.phi = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.0, 1.0))

        def inner_parameters(self):
            return [self.theta]

        def inner_loss(self, batch):
            return sign * 0.5 * (self.theta - self.phi).square()

        def outer_loss(self, batch):
            return 0.5 * (self.theta - 3).square()

        def configure_inner_optimizer(self):
            return optimizer

    return Toy()


UPWARDS: dict[str, tuple[LinearSolver, float]] = {
    "Identity": (Identity(0.1), -0.2),
    "adapted": (Identity(adapt=True), -0.2),
    "CG": (ConjugateGradient(), -2.0),
    "Nystrom": (Nystrom(rho=1e-6), -2.0),
    "Neumann": (Neumann(200, step_size=0.1), -2.0),
    "Dense": (Dense(), -2.0),
    "fixed point": (Neumann(200, step_size=1.0), -2.0),
}


@pytest.mark.parametrize("name", UPWARDS)
def test_ascent_has_the_sign_of_descent(name: str) -> None:
    solver, expected = UPWARDS[name]
    strategy = ImplicitGradient(solver, form="fixed_point" if name == "fixed point" else "gradient")
    grads = hypergradient(toy(SGD(0.1, maximize=True), 400, sign=-1.0), strategy, NONE).grads
    assert_close(grads, {"phi": torch.tensor(expected, dtype=torch.float64)}, 1e-5)
    assert_close(hypergradient(toy(SGD(0.1), 400), strategy, NONE).grads, grads, 1e-9)


def test_decay_of_the_field_guide() -> None:
    for solver in (Dense(), ConjugateGradient(), Neumann(200, step_size=0.1), Nystrom(rho=1e-9)):
        grads = hypergradient(toy(SGD(0.1, weight_decay=1.0), 400), ImplicitGradient(solver), NONE).grads
        assert_close(grads, {"phi": torch.tensor(-1.25, dtype=torch.float64)}, 1e-7)


# --- Fits ---


class Quadratic(BilevelModule):
    """g = (θ − φ)²/2 and f = (θ − 3)²/2 + φ²/2: with a decay of 1 θ is φ/2, and φ = 1.2 is best (2.0 is without)."""

    def __init__(self, optimizer: Callable[[Quadratic], InnerOptimizer], inner_steps: int = 1) -> None:
        super().__init__(inner_steps, inner_start="warm")
        self.theta, self.phi = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.0, 0.0))
        self.log_decay = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.optimizer = optimizer

    def inner_parameters(self):
        return [self.theta]

    def outer_parameters(self):
        return [self.phi, self.log_decay]

    def inner_loss(self, batch):
        return 0.5 * (self.theta - self.phi).square()

    def outer_loss(self, batch):
        return 0.5 * (self.theta - 3).square() + 0.5 * (self.phi.square() + self.log_decay.square())

    def configure_inner_optimizer(self):
        return self.optimizer(self)

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": [self.phi]}, {"params": [self.log_decay], "lr": 0.0}], lr=0.1)


FITS = {
    "FSLA": (FSLA(beta=0.2), lambda m: SGD(0.2, weight_decay=1.0), 1),
    "FSLA, tau": (FSLA(beta=0.2, tau=0.2), lambda m: Adam(weight_decay=1.0), 1),
    "FSLA, learned": (FSLA(beta=0.2), lambda m: SGD(0.2, weight_decay=m.log_decay.exp()), 1),
    "FSLA, torch": (FSLA(beta=0.2), lambda m: torch.optim.SGD([m.theta], 0.2, weight_decay=1.0), 1),
    "implicit": (ImplicitGradient(ConjugateGradient()), lambda m: SGD(0.2, weight_decay=1.0), 5),
    "fixed point": (ImplicitGradient(Dense(), form="fixed_point"), lambda m: SGD(0.2, weight_decay=1.0), 5),
}


@pytest.mark.parametrize(("strategy", "optimizer", "steps"), FITS.values(), ids=FITS)
def test_a_fit_ends_at_the_minimum_with_decay(strategy: Any, optimizer: Any, steps: int) -> None:
    module = Quadratic(optimizer, steps)
    trainer(strategy, max_steps=400, max_epochs=-1).fit(module, listed([NONE] * 400))
    assert module.phi.item() == pytest.approx(1.2, abs=1e-5)


@pytest.mark.parametrize("tau", [None, 0.2])
def test_the_single_loop_ends_at_the_gradient_of_a_learned_decay(tau: float | None) -> None:
    """With τ the optimizer's own step, with its moments, is not taken."""

    def optimizer(module: Weighted) -> InnerOptimizer:
        return (SGD if tau is None else Adam)(0.2, weight_decay=learned(module))

    module = Weighted(optimizer, 1, inner_start="warm")
    loader = EpisodeLoader([torch.ones(())], [torch.ones(())] * 400)
    trainer(FSLA(beta=0.2, tau=tau), max_steps=400).fit(module, loader)
    expected = module.closed_form(per_parameter)
    assert_close({name: getattr(module, name).grad for name in expected}, expected, 1e-7)


def test_the_single_loop_climbs() -> None:
    results = []
    for sign in (1.0, -1.0):
        for tau in (None, 0.15):
            optimizer = SGD(0.15, weight_decay=0.3, maximize=sign < 0)
            module = Weighted(lambda m, optimizer=optimizer: optimizer, 1, sign, inner_start="warm")
            trainer(FSLA(beta=0.1, tau=tau), max_steps=5, max_epochs=-1).fit(module, listed([NONE] * 5))
            results.append({"p": module.p.grad, "theta": module.theta.detach()})
    for other in results[1:]:
        assert_close(other, results[0], 1e-12)


# --- Fixed points of any update ---


class Projected(InnerOptimizer):
    """Descent that stays below a bound, which may be learned."""

    stationary = False

    def __init__(self, bound: float | Tensor) -> None:
        self.bound = bound

    def update(self, params, grads, opt_state, step):
        stepped = {name: value - 0.1 * grads[name] for name, value in params.items()}
        bound = torch.as_tensor(self.bound, dtype=torch.float64)
        return {name: torch.minimum(value, bound) for name, value in stepped.items()}, {}


class Coupled(InnerOptimizer):
    """Clipped by the norm over all parameters, with momentum and a decay of its own."""

    elementwise = False

    def init(self, params):
        return {"velocity": {name: torch.zeros_like(value) for name, value in params.items()}}

    def update(self, params, grads, opt_state, step):
        scale = 1 / (1 + sum(grad.square().sum() for grad in grads.values()).sqrt())
        velocity = {name: 0.5 * opt_state["velocity"][name] + scale * grads[name] for name in params}
        return {n: 0.95 * value - 0.1 * velocity[n] for n, value in params.items()}, {"velocity": velocity}


UPDATES: dict[str, Make] = {
    "SGD": lambda m: SGD(0.15),
    "SGD with decay": lambda m: SGD(0.15, weight_decay=0.6),
    "momentum": lambda m: SGD(0.1, momentum=0.7, weight_decay=0.2),
    "nesterov": lambda m: SGD(0.1, momentum=0.7, nesterov=True, weight_decay=learned(m)),
    "AdamW": lambda m: AdamW(0.1, (0.5, 0.8), eps=0.5, weight_decay=0.3),
    "AdamW, learned": lambda m: AdamW(0.1, (0.5, 0.8), eps=0.5, weight_decay=learned(m)),
    "torch's AdamW": lambda m: torch.optim.AdamW(m.inner_parameters(), 0.1, (0.5, 0.8), eps=0.5, weight_decay=0.3),
    "projected": lambda m: Projected(0.1),
    "a learned bound": lambda m: Projected(m.log_decay[0].exp() * 0.3),
    "coupled": lambda m: Coupled(),
}
FIXED: dict[str, LinearSolver] = {"Dense": Dense(), "Neumann": Neumann(terms=400, step_size=1.0)}
every_update = pytest.mark.parametrize("optimizer", UPDATES.values(), ids=UPDATES)


@pytest.mark.parametrize("solver", FIXED.values(), ids=FIXED)
@every_update
def test_fixed_points_agree_with_unrolling(optimizer: Make, solver: LinearSolver) -> None:
    module = Weighted(optimizer, 800)
    found = hypergradient(module, ImplicitGradient(solver, form="fixed_point"), NONE)
    assert found.metrics["inner_residual"] < 1e-8
    assert_close(found.grads, hypergradient(module, ReverseUnroll("sqrt"), NONE).grads, 1e-7)


def test_gradients_would_be_wrong_there() -> None:
    """The comparison above can fail."""
    module = Weighted(UPDATES["coupled"], 800)
    with pytest.warns(UserWarning, match="^`ImplicitGradient` takes θ_T for a stationary point"):
        wrong = hypergradient(module, ImplicitGradient(Dense()), NONE).grads
    with pytest.raises(AssertionError, match="^p: "):
        assert_close(wrong, hypergradient(module, ReverseUnroll(), NONE).grads, 0.1)


@every_update
def test_terms_are_steps_of_back_propagation_at_the_fixed_point(optimizer: Make) -> None:
    """K terms at ``step_size=1`` are reverse mode through the last K steps, once the state stands still."""
    module = Weighted(optimizer, 800)
    functional = module.functional()
    problem, phi = functional.problem, functional.phi()
    with functional.session():
        start = problem.start(InnerState(functional.theta()), phi)
        state = run(problem, start, phi, problem.batches(NONE)).state
        condition = inner_step(problem).fixed_point(state, phi, None)
        pulled = inner_step(problem).vjp(state, phi, [None] * 3)
    d = {name: draw(*value.shape, seed=30) for name, value in state.params.items()}
    term = {**tree.zeros_like(condition.residual), **d}
    total = tree.zeros_like(phi)
    for _ in range(3):
        total = tree.sub(total, condition.mixed(term))
        term = tree.sub(term, condition.transposed(term))
    left, through = pulled.pull(dict(d), list(state.flat()))
    assert_close(through, total, 1e-9)
    assert_close(left, term, 1e-9)


@every_update
def test_three_episodes_of_fixed_points_stacked_are_the_loop(optimizer: Make) -> None:
    batch = [Episode([draw(seed=20 + i)], None) for i in range(3)]
    strategy = ImplicitGradient(Neumann(terms=7, step_size=0.9), form="fixed_point")
    # Clipping by the norm goes over one episode at a time.
    each = [hypergradient(Weighted(optimizer, 5), strategy, episode).grads for episode in batch]
    mean = {name: torch.stack([grads[name] for grads in each]).mean(0) for name in each[0]}
    assert_close(hypergradient(Weighted(optimizer, 5), strategy, batch).grads, mean, 1e-10)


def test_the_bound_of_the_field_guide() -> None:
    strategy = ImplicitGradient(Neumann(20, step_size=1.0), form="fixed_point")
    grads = hypergradient(toy(Projected(0.5), 400), strategy, NONE).grads
    assert_close(grads, {"phi": torch.zeros((), dtype=torch.float64)})


def tangent(like: Params, seed: int) -> Params:
    return {name: draw(*value.shape, seed=seed) for name, value in like.items()}


@pytest.mark.parametrize("name", ["AdamW", "coupled"])
def test_products_of_a_fixed_point_are_differences_of_the_step(name: str) -> None:
    module = Weighted(UPDATES[name], 3)
    functional = module.functional()
    problem, phi = functional.problem, functional.phi()
    with functional.session():
        start = problem.start(InnerState(functional.theta()), phi)
        state = run(problem, start, phi, problem.batches(NONE)).state
        residual, transposed, mixed, _ = inner_step(problem).fixed_point(state, phi, None)

        def moved(z: Params, v: Params) -> Params:
            at = state.unflat(tree.add(state.flat(), z))
            after, _ = inner_step(problem)(at, tree.add(phi, v), None)
            return tree.sub(at.flat(), after.flat())

        z, w = (tangent(state.flat(), seed) for seed in (40, 42))
        v = tangent(phi, 41)
        ends = [moved(tree.scale(z, step), tree.scale(v, step)) for step in (DIFFERENCE, -DIFFERENCE)]
        difference = tree.scale(tree.sub(*ends), 1 / (2 * DIFFERENCE))
        assert_close(residual, moved(tree.zeros_like(z), tree.zeros_like(v)), 1e-12)
        for _ in range(2):  # the graph stays
            found = tree.dot(transposed(w), z) + tree.dot(mixed(w), v)
            torch.testing.assert_close(found, tree.dot(w, difference), rtol=1e-6, atol=1e-9)


def test_batches_are_those_of_the_other_form() -> None:
    """The system on the first spare batch, the mixed product on the second."""
    scales = draw(4, seed=50).unbind()
    module = Weighted(lambda m: SGD(0.1, momentum=0.5), 2)
    found = hypergradient(module, ImplicitGradient(Dense(), form="fixed_point"), Episode(list(scales), None)).grads
    functional = module.functional()
    problem, phi = functional.problem, functional.phi()
    with functional.session():
        start = problem.start(InnerState(functional.theta()), phi)
        state = run(problem, start, phi, scales[:2]).state
        first, second = (inner_step(problem).fixed_point(state, phi, scale) for scale in scales[2:])
        theta = tree.leaves(state.params)
        d = tree.grad(problem.outer_loss(theta, phi, None, {}), theta)
    size = tree.numel(state.flat())
    rows = [first.transposed(tree.unflatten(unit, state.flat())) for unit in torch.eye(size, dtype=torch.float64)]
    matrix = torch.stack([tree.flatten(row) for row in rows], dim=1)
    right = tree.flatten({**tree.zeros_like(state.flat()), **d})
    x = tree.unflatten(torch.linalg.solve(matrix, right), state.flat())
    assert_close({"p": found["p"]}, {"p": -second.mixed(x)["p"]}, 1e-9)


# --- A solver of one's own ---


def test_a_solver_that_looks_nowhere_is_differentiated() -> None:
    module = RidgeSolver()
    episode = module.episode()
    for solver in (Dense(), Identity(), Neumann(3, step_size=1.0)):  # A = 0, so that any of them is exact
        found = hypergradient(module, ImplicitGradient(solver, form="fixed_point"), episode)
        assert_close(found.grads, module.optimum(episode).grads, 1e-10)


def test_a_solver_that_cannot_be_differentiated_is_refused() -> None:
    module = RidgeBlackBox()
    with pytest.raises(MisconfigurationError, match="^Cannot use `ImplicitGradient` with `solve_inner` and `differen"):
        hypergradient(module, ImplicitGradient(Dense(), form="fixed_point"), module.episode())


# --- Refusals ---

ELSEWHERE = {
    "AdamW": UPDATES["AdamW"],
    "learned": UPDATES["AdamW, learned"],
    "torch": UPDATES["torch's AdamW"],
    "default": lambda m: AdamW(0.1),
    "own": UPDATES["projected"],
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_gradients_are_refused_where_they_are_known_not_to_vanish(name: str) -> None:
    kind = "Projected" if name == "own" else "AdamW"
    message = rf"^Cannot use `ImplicitGradient` with the inner optimizer `{kind}`\..*form=\"fixed_point\""
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(Weighted(ELSEWHERE[name]), ImplicitGradient(Dense()), NONE)
    module = Weighted(ELSEWHERE[name], 1, inner_start="warm")
    for strategy in (FSLA(), FSLA(tau=0.1)):
        with pytest.raises(MisconfigurationError, match="^Cannot use `FSLA` with (an|the) inner optimizer"):
            trainer(strategy, max_steps=1).fit(module, listed([NONE]))


def test_adamw_without_decay_is_taken() -> None:
    module = Weighted(lambda m: AdamW(0.2, eps=1.0, weight_decay=0))
    found = hypergradient(module, ImplicitGradient(Dense()), NONE).grads
    assert_close(found, module.closed_form(lambda log_decay: (0.0, 0.0)), 1e-7)


RATES = {
    "lr": lambda m: SGD(m.log_decay[0].exp(), weight_decay=0.1),
    "lr of one": lambda m: SGD({"b": 0.1, "*": m.log_decay[0].exp()}, weight_decay=m.log_decay[1].exp()),
    "momentum": lambda m: SGD(0.1, momentum=m.log_decay[0].sigmoid()),
    "beta": lambda m: Adam(0.1, (m.log_decay[0].sigmoid(), 0.9)),
}


@pytest.mark.parametrize("form", ["gradient", "fixed_point"])
@pytest.mark.parametrize("optimizer", RATES.values(), ids=RATES)
def test_learned_rates_are_refused_in_both_forms(optimizer: Make, form: Any) -> None:
    message = "^Cannot use `ImplicitGradient` with an inner optimizer that depends on the outer parameters"
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(Weighted(optimizer), ImplicitGradient(Dense(), form), NONE)


def test_learned_rates_are_refused_by_the_single_loop() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use `FSLA` with an inner optimizer that depends on φ"):
        trainer(FSLA(), max_steps=1).fit(Weighted(RATES["lr"], 1, inner_start="warm"), listed([NONE]))


@pytest.mark.parametrize("solver", [ConjugateGradient(), Nystrom()], ids=["CG", "Nystrom"])
def test_solvers_of_symmetric_systems_are_refused_at_once(solver: LinearSolver) -> None:
    with pytest.raises(MisconfigurationError, match=f"^Cannot use `{type(solver).__name__}` with a linear system that"):
        ImplicitGradient(solver, form="fixed_point")


def test_a_preconditioner_is_refused_at_once() -> None:
    with pytest.raises(
        MisconfigurationError, match=r"^Cannot use `Identity\(adapt=True\)` with `ImplicitGradient\(form"
    ):
        ImplicitGradient(Identity(adapt=True), form="fixed_point")


def test_other_forms_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^Expected `ImplicitGradient\(form=\.\.\.\)` to be 'gradient' or 'fixed_point'"
    ):
        ImplicitGradient(Dense(), form="update")


def test_the_forms_say_what_they_differentiate() -> None:
    assert ImplicitGradient(Dense()).differentiates == {"inner_gradient"}
    assert ImplicitGradient(Dense(), form="fixed_point").differentiates == {"run"}
    assert ImplicitGradient(Identity(), form="fixed_point").second_order


# --- Costs ---


@pytest.mark.parametrize("form", ["gradient", "fixed_point"])
def test_a_decay_and_the_residual_evaluate_no_loss_more(form: Any) -> None:
    module = Weighted(lambda m: SGD(0.1, weight_decay=learned(m)), 5)
    functional, evaluated = module.functional(), []

    def spy(*args: Any) -> Any:
        evaluated.append(1)
        return functional.problem.inner_loss(*args)

    problem = replace(functional.problem, inner_loss=spy)
    carry = Carry(InnerState(functional.theta()))
    with functional.session():
        ImplicitGradient(Neumann(3, step_size=0.1), form).estimate(problem, carry, functional.phi(), NONE, call_of())
    assert len(evaluated) == 5 + 1


# --- An outer optimizer that evaluates several times a step ---


class Again(torch.optim.SGD):
    """Runs its closure twice, as sharpness-aware minimization does."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


class Outer(Mlp):
    def __init__(self, outer: Callable[[Any], Any], **options: Any) -> None:
        super().__init__("SGD", learned=False, **options)
        self.outer = outer

    def configure_optimizers(self):
        return self.outer(self.outer_parameters())


def test_lbfgs_beside_a_warm_start_is_refused_before_the_first_batch() -> None:
    module, seen = Outer(torch.optim.LBFGS, inner_start="warm"), Before(lambda *args: None)
    with pytest.raises(
        MisconfigurationError, match="^Cannot use the outer optimizer `LBFGS` with `inner_start='warm'`"
    ):
        trainer(ReverseUnroll(), seen, max_steps=2).fit(module, listed(episodes(2)))
    assert not seen.values


def test_others_are_refused_when_they_do_it_again() -> None:
    module = Outer(lambda parameters: Again(parameters, lr=0.1), inner_start="warm")
    with pytest.raises(MisconfigurationError, match="^Cannot use an outer optimizer that runs its closure again with"):
        trainer(ReverseUnroll(), max_steps=2).fit(module, listed(episodes(2)))


@pytest.mark.parametrize("outer", [torch.optim.LBFGS, lambda parameters: Again(parameters, lr=0.1)])
@pytest.mark.parametrize("options", [{"inner_start": "reset"}, {"inner_start": "warm", "shared": True}], ids=str)
def test_they_are_taken_where_each_evaluation_starts_anew(outer: Any, options: Any) -> None:
    trainer(ReverseUnroll(), max_steps=2).fit(Outer(outer, **options), listed(episodes(2)))


def test_one_evaluation_a_batch_is_taken_beside_a_warm_start() -> None:
    module = Outer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), inner_start="warm")
    trainer(ReverseUnroll(), max_epochs=2, accumulate_grad_batches=2).fit(module, listed(episodes(4)))
