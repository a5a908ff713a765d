"""Implicit hypergradients in sequences: a carried x from step to step, and a fresh batch for each product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import SGD, Episode, ImplicitGradient, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import ConjugateGradient, Dense, Identity, LinearSolver, Neumann, Nystrom
from lightning_bilevel.problem import Carry, InnerState
from tests.support.problems import Problem, Quadratic, assert_close, draw

LR = 0.3
DRAWS = 250


# --- A carried solution ---


def amigo(module: Quadratic, episode: Episode, steps: int, terms: int) -> list[Tensor]:
    """Return ĝ of outer steps with φ frozen, by hand: T steps of θ, K steps x ← x − β(Ax − d), ĝ = ρφ + Bᵀx."""
    theta, x, found = module.theta.detach(), torch.zeros(4, dtype=torch.float64), []
    b = (module.B @ module.phi + episode.inner[0]).detach()
    for _ in range(steps):
        for _ in range(module.inner_steps):
            theta = theta - LR * (module.A @ theta - b)
        d = module.C.T @ (module.C @ theta - episode.outer)
        for _ in range(terms):
            x = x - LR * (module.A @ x - d)
        found.append(module.rho * module.phi.detach() + module.B.T @ x)
    return found


@pytest.mark.parametrize("terms", [1, 3])
def test_a_warm_series_is_amigo(terms: int) -> None:
    module = Quadratic(inner_steps=2, lr=LR)
    module.inner_start = "warm"
    episode, carry = module.episode(), None
    strategy = ImplicitGradient(Neumann(terms, step_size=LR), warm_start=True)
    for expected in amigo(module, episode, 5, terms):
        result = hypergradient(module, strategy, episode, carry=carry)
        carry = result.carry
        assert_close(result.grads, {"phi": expected}, 1e-11)


def test_it_tends_to_the_solution_that_one_estimate_does_not_reach() -> None:
    module = Quadratic(inner_steps=2, lr=LR)
    module.inner_start = "warm"
    episode, exact = module.episode(), module.optimum(module.episode()).grads
    strategy, cold = (ImplicitGradient(Neumann(2, step_size=LR), warm_start=warm) for warm in (True, False))
    carry, other = None, None
    for _ in range(150):
        result = hypergradient(module, strategy, episode, carry=carry)
        single = hypergradient(module, cold, episode, carry=other)
        carry, other = result.carry, single.carry
    assert_close(result.grads, exact, 1e-8)
    with pytest.raises(AssertionError, match="^phi: "):
        assert_close(single.grads, exact, 0.1)


@pytest.mark.parametrize("form", ["gradient", "fixed_point"])
def test_what_is_carried_is_saved(form: Any, tmp_path: Path) -> None:
    module = Quadratic(inner_steps=2, lr=LR, momentum=0.5 if form == "fixed_point" else 0.0)
    solver = Neumann(2, step_size=1.0 if form == "fixed_point" else LR)
    first = hypergradient(module, ImplicitGradient(solver, form, warm_start=True), module.episode())
    torch.save(first.kept, tmp_path / "kept.pt")
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    ends = [
        hypergradient(module, ImplicitGradient(solver, form, warm_start=True), module.episode(), carry=carry)
        for carry in (first.carry, Carry(first.state, kept), Carry(first.state))
    ]
    assert torch.equal(ends[0].grads["phi"], ends[1].grads["phi"])
    assert not torch.equal(ends[0].grads["phi"], ends[2].grads["phi"])
    assert hypergradient(module, ImplicitGradient(solver, form), module.episode()).kept == {}


def test_conjugate_gradients_need_fewer_products_from_where_they_were() -> None:
    module = Quadratic(inner_steps=50, lr=LR)
    strategy = ImplicitGradient(ConjugateGradient(max_iter=20, tol=1e-10), warm_start=True)
    first = hypergradient(module, strategy, module.episode())
    again = hypergradient(module, strategy, module.episode(), carry=first.carry)
    assert_close(again.grads, first.grads, 1e-9)
    assert again.metrics["linear_residual"] < 1e-10


# --- A fresh batch for each product ---


class Sampled(Problem):
    """g = ½ mean (θ x_i)² − θφ with a Hessian for every batch, f = ½‖θ‖² + θ·e."""

    def __init__(self) -> None:
        super().__init__(inner_steps=1, inner_start="reset")
        self.theta, self.phi = nn.Parameter(draw(2, seed=1)), nn.Parameter(draw(2, seed=2))

    def inner_parameters(self):
        return [self.theta]

    def inner_loss(self, batch):
        return 0.5 * self.theta @ batch @ self.theta - self.theta @ batch @ self.phi

    def outer_loss(self, batch):
        return 0.5 * self.theta.square().sum() + self.theta @ batch

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)


def matrices(count: int, seed: int) -> list[Tensor]:
    roots = draw(count, 2, 3, seed=seed)
    return list(roots @ roots.mT / 3 + 0.2 * torch.eye(2, dtype=torch.float64))


def by_hand(module: Sampled, batches: list[Tensor], mixed: Tensor, outer: Tensor, terms: int) -> Tensor:
    first = batches[0]
    theta = module.theta.detach() - 0.1 * (first @ (module.theta - module.phi)).detach()
    d = theta + outer
    total = term = d
    for number in range(terms - 1):
        term = term - 0.1 * batches[1 + number % (len(batches) - 1)] @ term
        total = total + term
    return mixed.T @ (0.1 * total)  # c = 0, ∂²g/∂θ∂φ = −M


@pytest.mark.parametrize("terms", [1, 3, 6])
def test_each_product_takes_the_next_spare_batch_and_the_mixed_one_the_last(terms: int) -> None:
    """Three spare batches serve five products in turn, from the first again."""
    module, outer = Sampled(), draw(2, seed=3)
    first, *spare, mixed = matrices(5, seed=4)
    strategy = ImplicitGradient(Neumann(terms, step_size=0.1), batches="fresh")
    found = hypergradient(module, strategy, Episode([first, *spare, mixed], outer)).grads["phi"]
    torch.testing.assert_close(found, by_hand(module, [first, *spare], mixed, outer, terms))
    one = ImplicitGradient(Neumann(terms, step_size=0.1))
    found = hypergradient(module, one, Episode([first, *spare, mixed], outer)).grads["phi"]
    torch.testing.assert_close(found, by_hand(module, [first, spare[0]], spare[1], outer, terms))


def test_without_spare_batches_those_of_the_run_are_taken() -> None:
    module, outer, (first,) = Sampled(), draw(2, seed=3), matrices(1, seed=4)
    strategy = ImplicitGradient(Neumann(4, step_size=0.1), batches="fresh")
    found = hypergradient(module, strategy, Episode([first], outer)).grads["phi"]
    torch.testing.assert_close(found, by_hand(module, [first, first], first, outer, 4))


def test_fresh_batches_remove_the_bias_of_one() -> None:
    """The mean over draws of M against the series with the mean of M, in standard errors."""
    module, outer, terms, step = Sampled(), draw(2, seed=3), 6, 0.5
    population = torch.stack(matrices(40, seed=5))
    first, mean = population[0], population.mean(0)
    theta = module.theta.detach() - 0.1 * (first @ (module.theta - module.phi)).detach()
    eye, series = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for k in range(terms):
        series = series + step * torch.linalg.matrix_power(eye - step * mean, k)
    expected = first.T @ series @ (theta + outer)
    generator, functional = torch.Generator().manual_seed(0), module.functional()
    at = {"phi": functional.phi(), "carry": Carry(InnerState(functional.theta()))}

    def errors(batches: Any) -> float:
        strategy, found = ImplicitGradient(Neumann(terms, step_size=step), batches=batches), []
        for _ in range(DRAWS):
            drawn = population[torch.randint(40, (terms,), generator=generator)]
            order = [drawn[0], first] if batches == "one" else [*drawn, first]
            found.append(
                hypergradient(functional.problem, strategy, Episode([first, *order], outer), **at).grads["phi"]
            )
        samples = torch.stack(found)
        off = (samples.mean(0) - expected) / (samples.std(0) / DRAWS**0.5)
        return float(off.abs().max())

    assert errors("fresh") < 4
    assert errors("one") > 6


@pytest.mark.parametrize("solver", [ConjugateGradient(), Nystrom(rank=1), Dense()], ids=lambda s: type(s).__name__)
def test_solvers_of_one_matrix_are_refused(solver: LinearSolver) -> None:
    message = rf'^Cannot use `{type(solver).__name__}` with `ImplicitGradient\(batches="fresh"\)`'
    with pytest.raises(MisconfigurationError, match=message):
        ImplicitGradient(solver, batches="fresh")
    ImplicitGradient(Identity(), batches="fresh")
