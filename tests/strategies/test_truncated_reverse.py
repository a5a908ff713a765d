"""Truncated and first-order hypergradients: the terms that are left, the rate at which the error falls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bilevel import FirstOrder, ReverseUnroll, TruncatedReverse, hypergradient, tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.problem import Episode, InnerState
from tests.support.problems import (
    INNER_OPTIMIZERS,
    Mlp,
    Quadratic,
    RidgeBlackBox,
    RidgeSolver,
    assert_close,
    assert_optimum,
    episodes,
)

T = 200


def by_hand(module: Quadratic, episode: Episode, steps: int) -> dict[str, Tensor]:
    """Return c + Σ_{j < K} d A^j B for gradient descent, and d A^K for the start."""
    theta, phi = module.solution(episode).theta, module.phi.detach()
    contraction = torch.eye(len(theta), dtype=torch.float64) - module.lr * module.hessian
    d = module.C.T @ (module.C @ theta - episode.outer)
    through_b = torch.zeros_like(d)
    for _ in range(steps):
        through_b, d = through_b + module.lr * d, contraction @ d
    grads = {"phi": module.rho * phi + module.B.T @ through_b}
    if module.shared:
        grads = {"theta": d + module.proximal * through_b, **grads}
    return grads


@pytest.mark.parametrize(
    "options", [{}, {"shared": True}, {"shared": True, "proximal": 0.4}], ids=["", "shared", "proximal"]
)
@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_terms_that_are_left(steps: int, options: dict) -> None:
    module = Quadratic(inner_steps=6, **options)
    episode = module.episode()
    strategy = TruncatedReverse(steps) if steps else FirstOrder()
    result, solution = hypergradient(module, strategy, episode), module.solution(episode)
    assert_close(result.grads, by_hand(module, episode, steps))
    torch.testing.assert_close(result.value, solution.value)
    torch.testing.assert_close(result.state.params["theta"], solution.theta)
    if steps == 6:
        assert_close(result.grads, solution.grads)


def test_error_falls_geometrically_and_within_the_bound() -> None:
    module = Quadratic(inner_steps=T)
    episode = module.episode()
    solution = module.solution(episode)
    smallest, largest = torch.linalg.eigvalsh(module.A)[[0, -1]].tolist()
    assert module.lr * largest <= 1, "the bound is for such learning rates"
    rate = 1 - module.lr * smallest
    d = module.C.T @ (module.C @ solution.theta - episode.outer)
    step_by_phi = torch.linalg.matrix_norm(module.lr * module.B, ord=2)

    errors = {}
    for steps in (1, 2, 5, 10, 20, 40, 80, 90):
        grads = hypergradient(module, TruncatedReverse(steps), episode).grads
        errors[steps] = tree.norm(tree.sub(grads, solution.grads)).item()
        assert errors[steps] <= rate**steps / (module.lr * smallest) * d.norm() * step_by_phi
    # Far from both ends of the run the smallest eigenvalue alone sets the rate.
    assert (errors[90] / errors[80]) ** 0.1 == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_truncation_equals_a_short_run_from_the_cut(inner: str) -> None:
    module, (episode,) = Mlp(inner, inner_steps=5), episodes(1)
    functional = module.functional()
    problem, phi = functional.problem, functional.phi()
    outer = tree.leaves(phi)
    start = problem.start(InnerState(functional.theta()), phi)
    theta, opt_state = start.params, start.opt_state
    for number, batch in enumerate(problem.batches(episode)):
        if number <= 2:  # the last cut is before the third step
            theta, opt_state = tree.leaves(theta), {slot: tree.detach(values) for slot, values in opt_state.items()}
        loss, _ = problem.inner_loss(theta, outer, batch, {})
        grads = tree.grad(loss, theta, create_graph=True)
        theta, opt_state = problem.update(theta, grads, opt_state, outer, number + 1)
    value = problem.outer_loss(theta, outer, episode.outer, {})
    assert_close(hypergradient(module, TruncatedReverse(3), episode).grads, tree.grad(value, outer))


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_error_falls_as_steps_are_added(shared: bool) -> None:
    module, (episode,) = Mlp("SGD", shared=shared, inner_steps=12), episodes(1)
    exact = hypergradient(module, ReverseUnroll(), episode).grads
    errors = [
        tree.norm(tree.sub(hypergradient(module, TruncatedReverse(steps), episode).grads, exact)).item()
        for steps in (1, 4, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < 1e-4 < errors[0]


# --- A user's own solver is a run of one step ---


@pytest.mark.parametrize("steps", [1, 3])
def test_exact_through_a_solver(steps: int) -> None:
    module = RidgeSolver()
    episode = module.episode()
    result, optimum = hypergradient(module, TruncatedReverse(steps), episode), module.optimum(episode)
    assert_optimum(result, optimum)


def test_refuses_a_solver_without_derivatives() -> None:
    module = RidgeBlackBox()
    message = "^Cannot use `TruncatedReverse` with `solve_inner` and `differentiable_solve = False`"
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(module, TruncatedReverse(1), module.episode())
