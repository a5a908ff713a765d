"""Implicit hypergradients against closed forms: a quadratic, ridge regression, iMAML, preconditioners by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bilevel import SGD, Adam, Episode, ImplicitGradient, ReverseUnroll, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.linear_solvers import ConjugateGradient, Dense, Identity, LinearSolver, Neumann, Nystrom
from lightning_bilevel.tree import Params
from tests.support.problems import (
    Mlp,
    Problem,
    Quadratic,
    Ridge,
    RidgeBlackBox,
    RidgeSolver,
    assert_close,
    assert_optimum,
    draw,
    episodes,
    train,
)

LR = 0.3
"""Of all quadratics here: below 1/λ_max, which is 1/2.0."""

SOLVERS: dict[str, tuple[LinearSolver, float]] = {  # solver, relative tolerance
    "Dense": (Dense(), 1e-10),
    "CG": (ConjugateGradient(tol=1e-13), 1e-10),
    "Neumann": (Neumann(terms=400, step_size=LR), 1e-10),
    "Nystrom": (Nystrom(rank=4, rho=1e-8), 1e-6),  # ρ biases by ρ/λ, and rounding is magnified by 1/ρ
}
every_solver = pytest.mark.parametrize(("solver", "rtol"), SOLVERS.values(), ids=SOLVERS)


def quadratic(inner_steps: int, **options: Any) -> tuple[Quadratic, Episode]:
    module = Quadratic(inner_steps, lr=LR, **options)
    return module, module.episode()


def outer_slope(module: Quadratic, episode: Episode, theta: Tensor) -> Tensor:
    """Return d = ∂f/∂θ."""
    return module.C.T @ (module.C @ theta - episode.outer)


def along(module: Quadratic, episode: Episode, theta: Tensor, x: Tensor) -> Params:
    """Return c − x ∂²g/∂θ∂φ, which is ρφ + Bᵀx."""
    return {"phi": module.rho * module.phi.detach() + module.B.T @ x}


# --- The implicit function theorem ---


@every_solver
def test_exact_at_the_minimum_of_a_quadratic(solver: LinearSolver, rtol: float) -> None:
    module, episode = quadratic(400)
    result, optimum = hypergradient(module, ImplicitGradient(solver), episode), module.optimum(episode)
    assert_optimum(result, optimum, rtol)


@every_solver
def test_follows_the_formula_away_from_the_minimum(solver: LinearSolver, rtol: float) -> None:
    module, episode = quadratic(3, momentum=0.8)
    theta = module.solution(episode).theta
    grads = hypergradient(module, ImplicitGradient(solver), episode).grads
    assert_close(grads, module.implicit(episode, theta), rtol)
    with pytest.raises(AssertionError, match="^phi: "):
        assert_close(grads, module.solution(episode).grads, 1e-2)


@pytest.mark.parametrize("products", [1, 3])
def test_the_residual_of_the_solver_is_a_metric(products: int) -> None:
    module, episode = quadratic(3)
    with pytest.warns(UserWarning, match=rf"^`ConjugateGradient\(max_iter={products}\)` reached a relative residual"):
        result = hypergradient(module, ImplicitGradient(ConjugateGradient(max_iter=products, tol=1e-13)), episode)
    slope = outer_slope(module, episode, module.solution(episode).theta)
    powers = torch.stack([torch.linalg.matrix_power(module.A, k) @ slope for k in range(products)], dim=1)
    # The iterate minimizes ½xᵀAx − xᵀd over the Krylov space.
    x = powers @ torch.linalg.solve(powers.T @ module.A @ powers, powers.T @ slope)
    assert_close(result.grads, along(module, episode, result.state.params["theta"], x), 1e-9)
    residual = (slope - module.A @ x).norm() / slope.norm()
    torch.testing.assert_close(result.metrics["linear_residual"], residual)


# --- Neumann is unrolling ---


class Logistic(Ridge):
    """Ridge regression's penalty on a logistic loss: H and the mixed derivative both depend on θ."""

    def outer_loss(self, batch):
        x, y = batch
        return F.softplus(-y.sign() * (x @ self.weight)).sum()

    def go_to_the_optimum(self, episode: Episode) -> None:
        """Minimize the inner loss by Newton's method."""
        for _ in range(12):
            weight = self.weight.detach().requires_grad_()
            penalty = self.log_penalty.detach().exp()

            def loss(weight: Tensor, penalty: Tensor = penalty) -> Tensor:
                x, y = episode.inner[0]
                return F.softplus(-y.sign() * (x @ weight)).sum() + 0.5 * (penalty * weight.square()).sum()

            hessian = torch.autograd.functional.hessian(loss, weight)
            step = torch.linalg.solve(hessian, torch.autograd.grad(loss(weight), weight)[0])
            with torch.no_grad():
                self.weight.sub_(step)
        assert step.abs().max() < 1e-14


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_neumann_equals_unrolling_a_quadratic_from_any_start(steps: int) -> None:
    module, episode = quadratic(steps)
    implicit = hypergradient(module, ImplicitGradient(Neumann(terms=steps, step_size=LR)), episode)
    assert_close(implicit.grads, module.solution(episode).grads, 1e-12)
    assert_close(implicit.grads, hypergradient(module, ReverseUnroll(), episode).grads, 1e-12)


@pytest.mark.parametrize("steps", [1, 7])
def test_neumann_equals_unrolling_other_losses_from_the_optimum_only(steps: int) -> None:
    module = Logistic(lr=0.1, inner_steps=steps)
    episode = module.episode()
    strategies = ImplicitGradient(Neumann(terms=steps, step_size=0.1)), ReverseUnroll()
    implicit, unrolled = (hypergradient(module, strategy, episode).grads for strategy in strategies)
    with pytest.raises(AssertionError, match="^log_penalty: "):
        assert_close(implicit, unrolled, 0.05)
    module.go_to_the_optimum(episode)
    implicit, unrolled = (hypergradient(module, strategy, episode).grads for strategy in strategies)
    assert_close(implicit, unrolled, 1e-12)


@pytest.mark.parametrize("steps", [1, 7])
def test_unrolling_a_shared_start_adds_what_is_left_of_it(steps: int) -> None:
    module, episode = quadratic(steps, shared=True, proximal=0.4)
    neumann = ImplicitGradient(Neumann(terms=steps, step_size=LR))
    implicit, unrolled = (hypergradient(module, strategy, episode).grads for strategy in (neumann, ReverseUnroll()))
    decay = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - LR * module.hessian, steps)
    left = decay @ outer_slope(module, episode, module.solution(episode).theta)
    assert_close(unrolled, {"theta": implicit["theta"] + left, "phi": implicit["phi"]}, 1e-12)


# --- No Hessian at all ---


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_identity_is_one_term_of_neumann(scale: float) -> None:
    module, episode = quadratic(3, momentum=0.8)
    theta = module.solution(episode).theta
    by_hand = along(module, episode, theta, scale * outer_slope(module, episode, theta))
    for solver in (Identity(scale=scale), Neumann(terms=1, step_size=scale)):
        assert_close(hypergradient(module, ImplicitGradient(solver), episode).grads, by_hand, 1e-12)


class Optimized(Quadratic):
    """With an inner optimizer of the test's choice."""

    optimizer: InnerOptimizer

    def configure_inner_optimizer(self):
        return self.optimizer


SGD_STEPS = {  # optimizer, −∂θ_{T+1}/∂g
    "plain": (SGD(lr=LR), LR),
    "weight decay": (SGD(lr=LR, weight_decay=0.1), LR),
    "momentum": (SGD(lr=LR, momentum=0.7), LR),
    "dampening": (SGD(lr=LR, momentum=0.7, dampening=0.2), LR * 0.8),
    "nesterov": (SGD(lr=LR, momentum=0.7, nesterov=True), LR * 1.7),
}


@pytest.mark.parametrize(("optimizer", "factor"), SGD_STEPS.values(), ids=SGD_STEPS)
def test_adapted_identity_is_the_step_of_sgd(optimizer: InnerOptimizer, factor: float) -> None:
    module = Optimized(inner_steps=3)
    module.optimizer, episode = optimizer, module.episode()
    result = hypergradient(module, ImplicitGradient(Identity(scale=0.5, adapt=True)), episode)
    theta = result.state.params["theta"]
    by_hand = along(module, episode, theta, 0.5 * factor * outer_slope(module, episode, theta))
    assert_close(result.grads, by_hand, 1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 3])
def test_adapted_identity_is_the_step_of_adam(steps: int, weight_decay: float) -> None:
    lr, beta1, beta2, eps = 0.05, 0.7, 0.9, 0.01
    module = Optimized(inner_steps=steps)
    module.optimizer = Adam(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    episode = module.episode()
    theta, b = module.theta.detach(), (module.B @ module.phi + episode.inner[0]).detach()
    mean = square = torch.zeros_like(theta)
    for step in range(1, steps + 2):  # the preconditioner is that of the step after the last
        before = theta
        gradient = module.A @ theta - b + weight_decay * theta
        mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
        hat, root = mean / (1 - beta1**step), (square / (1 - beta2**step)).sqrt()
        theta = theta - lr * hat / (root + eps)
    by_mean = (1 - beta1) / (1 - beta1**step) / (root + eps)
    by_square = -hat / (root + eps) ** 2 * (1 - beta2) / (1 - beta2**step) * gradient / root
    slope = outer_slope(module, episode, before)
    grads = hypergradient(module, ImplicitGradient(Identity(adapt=True)), episode).grads
    assert_close(grads, along(module, episode, before, lr * (by_mean + by_square) * slope), 1e-11)
    with pytest.raises(AssertionError, match="^phi: "):  # each moment has its part
        assert_close(grads, along(module, episode, before, lr * by_mean * slope), 1e-2)


# --- iMAML ---


@pytest.mark.parametrize("solver", [Dense(), ConjugateGradient(tol=1e-12)], ids=["Dense", "CG"])
@pytest.mark.parametrize("proximal", [0.3, 2.0])
@pytest.mark.parametrize("steps", [3, 200])
def test_proximal_hypergradient_is_that_of_imaml(steps: int, proximal: float, solver: LinearSolver) -> None:
    module, episode = quadratic(steps, shared=True, proximal=proximal)
    theta = (module.optimum if steps == 200 else module.solution)(episode).theta
    slope = outer_slope(module, episode, theta)
    expected = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + module.A / proximal, slope)
    grads = hypergradient(module, ImplicitGradient(solver), episode).grads
    assert_close({"theta": grads["theta"]}, {"theta": expected}, 1e-9)
    if steps == 200:
        assert_close(grads, module.optimum(episode).grads, 1e-9)


# --- Which batches ---


class Scaled(Quadratic):
    """An inner batch is the scale of the Hessian and that of the mixed derivative."""

    def inner_loss(self, batch):
        stiffness, coupling = batch
        return 0.5 * stiffness * self.theta @ self.A @ self.theta - coupling * self.theta @ (self.B @ self.phi)


@pytest.mark.parametrize(
    ("batches", "for_hessian", "for_mixed"),
    [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 2, 3), (6, 2, 3)],
    ids=["cycled", "no spare", "one spare", "two spares", "four spares"],
)
def test_spare_inner_batches_give_the_hessian_and_the_mixed_product(
    batches: int, for_hessian: int, for_mixed: int
) -> None:
    module = Scaled(inner_steps=2)
    inner = [tuple(torch.tensor([1 + 0.1 * i, 2 + 0.3 * i], dtype=torch.float64)) for i in range(batches)]
    episode = Episode(inner, draw(5, seed=3))
    result, theta = hypergradient(module, ImplicitGradient(Dense()), episode), train(module, episode).theta.detach()
    x = torch.linalg.solve(inner[for_hessian][0] * module.A, outer_slope(module, episode, theta))
    assert_close(result.grads, along(module, episode, theta, inner[for_mixed][1] * x), 1e-12)
    assert_close(result.state.params, {"theta": theta}, 1e-12)


# --- A user's own solver ---


@pytest.mark.parametrize("kind", [RidgeSolver, RidgeBlackBox])
@pytest.mark.parametrize("solver", [Dense(), ConjugateGradient(tol=1e-12)], ids=["Dense", "CG"])
def test_ridge_regression_by_a_solver(solver: LinearSolver, kind: type[Ridge]) -> None:
    module = kind()
    episode = module.episode()
    result, optimum = hypergradient(module, ImplicitGradient(solver), episode), module.optimum(episode)
    assert_optimum(result, optimum)


# --- Refusals ---


class LearnedStep(Quadratic):
    """Its learning rate depends on φ, directly."""

    def configure_inner_optimizer(self):
        return SGD(lr=0.1 * self.phi[0].exp())


def refuse(module: Problem, episode: Episode, strategy: ImplicitGradient, message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(module, strategy, episode)


def test_refuses_shared_parameters_without_a_proximal_term() -> None:
    message = r"^Cannot use `ImplicitGradient` with parameters shared by both levels and `proximal=0`\."
    refuse(*quadratic(2, shared=True), ImplicitGradient(Dense()), message)


def test_refuses_a_learned_learning_rate() -> None:
    message = "^Cannot use `ImplicitGradient` with an inner optimizer that depends on the outer parameters"
    module = LearnedStep()
    refuse(module, module.episode(), ImplicitGradient(Dense()), message)
    refuse(Mlp(), *episodes(1), ImplicitGradient(Identity(adapt=True)), message)


def test_refuses_to_adapt_to_an_optimizer_that_is_not_there() -> None:
    module = RidgeSolver()
    refuse(
        module, module.episode(), ImplicitGradient(Identity(adapt=True)), r"^Cannot use `Identity\(adapt=True\)` with"
    )
    hypergradient(module, ImplicitGradient(Identity()), module.episode())


def test_reports_every_refusal_at_once() -> None:
    module = LearnedStep(shared=True)
    message = r"(?s)^Cannot use `ImplicitGradient` with parameters.*\nCannot use `ImplicitGradient` with an inner"
    refuse(module, module.episode(), ImplicitGradient(Dense()), message)


def test_names_the_missing_inner_loss_of_a_solver() -> None:
    class NoInnerLoss(RidgeSolver):
        inner_loss = Problem.inner_loss

    module = NoInnerLoss()
    refuse(module, module.episode(), ImplicitGradient(Dense()), "^`NoInnerLoss` has no `inner_loss`")


@pytest.mark.parametrize("solver", [None, Dense, "cg"], ids=str)
def test_refuses_what_is_no_solver(solver: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `ImplicitGradient\(solver=\.\.\.\)` to be a linear solver"):
        ImplicitGradient(solver)
