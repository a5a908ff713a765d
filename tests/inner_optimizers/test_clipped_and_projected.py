"""Clipping, projections and values per step: torch's own numbers, and right hypergradients in every strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import (
    FSLA,
    SGD,
    Adam,
    BilevelModule,
    Episode,
    GammaGreedy,
    ImplicitGradient,
    NAdam,
    ReverseUnroll,
    TruncatedReverse,
    hypergradient,
    tree,
)
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.inner_optimizers import InnerOptimizer, PerStep
from lightning_bilevel.linear_solvers import GMRES, ConjugateGradient, Dense
from tests.support.optimizers import gradient, run, start
from tests.support.problems import assert_close, draw
from tests.support.tables import Row, every_exact_strategy

T = 3


def clipped_by_torch(optimizer: Any, leaves: dict[str, Tensor], max_norm: float, steps: int) -> dict[str, Tensor]:
    for step in range(1, steps + 1):
        for name, grad in gradient(tree.detach(leaves), step).items():
            leaves[name].grad = grad
        torch.nn.utils.clip_grad_norm_(leaves.values(), max_norm)
        optimizer.step()
    return tree.detach(leaves)


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 1e3])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_clips_as_torch_does(kind: Any, max_norm: float) -> None:
    leaves = tree.leaves(tree.map(torch.clone, start()))
    expected = clipped_by_torch(getattr(torch.optim, kind.__name__)(leaves.values(), lr=0.1), leaves, max_norm, 5)
    torch.testing.assert_close(run(kind(lr=0.1, max_norm=max_norm), start(), 5), expected, rtol=1e-12, atol=1e-14)


def test_a_zero_gradient_has_a_derivative() -> None:
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = run(SGD(lr=0.1, max_norm=1.0), {"w": theta}, 2, lambda params, step: params)["w"]
    assert torch.isfinite(torch.autograd.grad(found.sum(), theta)[0]).all()


class Module(BilevelModule):
    """Everything that its optimizer may depend on is an outer parameter."""

    def __init__(self, optimizer: Callable[[Any], InnerOptimizer], **options: Any) -> None:
        super().__init__(**{"inner_steps": T, "inner_start": "reset", "allow_unused": True, **options})
        self.w, self.b = nn.Parameter(draw(3, seed=1)), nn.Parameter(draw(2, seed=2))
        self.p, self.rates = nn.Parameter(draw(5, seed=3)), nn.Parameter(torch.linspace(-2, -1, T).double())
        self.size = nn.Parameter(torch.tensor(-0.5).double())
        self.optimizer = optimizer

    def inner_parameters(self) -> list[Tensor]:
        return [self.w, self.b]

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.p.sigmoid() * (x @ self.w + self.b.sum() - y).square()).mean() + self.b.square().sum()

    def outer_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (x @ self.w + self.b.prod() - y).square().mean()

    def configure_inner_optimizer(self) -> InnerOptimizer:
        return self.optimizer(self)


def episode(seed: int = 10) -> Episode:
    x, y, a, b = draw(5, 3, seed=seed), draw(5, seed=seed + 1), draw(5, 3, seed=seed + 2), draw(5, seed=seed + 3)
    return Episode([(x, y)], (a, b))


def soft(params: dict[str, Tensor], by: Any) -> dict[str, Tensor]:
    """The proximal map of by ‖θ‖₁."""
    return {name: value.sign() * (value.abs() - by).clamp(min=0) for name, value in params.items()}


def onto_a_ball(params: dict[str, Tensor]) -> dict[str, Tensor]:
    length = torch.cat([value.reshape(-1) for value in params.values()]).norm()
    return {name: value / length.clamp(min=1.0) for name, value in params.items()}


RULES: dict[str, Callable[[Any], InnerOptimizer]] = {
    "clipped": lambda m: SGD(0.2, momentum=0.5, max_norm=0.8),
    "clipped by a learned norm": lambda m: Adam(0.1, eps=0.1, max_norm=m.size.exp()),
    "projected onto a ball": lambda m: SGD(0.3, projection=onto_a_ball),
    "a proximal map": lambda m: SGD(0.2, projection=lambda params: soft(params, 0.1 * m.size.exp())),
    "a rate per step": lambda m: SGD(lr=PerStep(m.rates.exp())),
    "a rate per step and layer": lambda m: NAdam(lr={"b": 0.1, "*": PerStep(list(m.rates.exp()))}, eps=0.1),
    "momentum from the second step": lambda m: SGD(0.2, momentum=PerStep([0, 0.5, 0.9])),
    "all": lambda m: SGD(PerStep(m.rates.exp()), max_norm=0.8, projection=onto_a_ball),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def by_hand(rule: Callable[[Any], InnerOptimizer], data: Episode) -> dict[str, Tensor]:
    """Return central differences of h, from runs of the rule by hand."""
    module = Module(rule)
    names = ["p", "rates", "size"]

    def value() -> float:
        (x, y), (a, b) = data.inner[0], data.outer
        optimizer = rule(module)
        theta: dict[str, Tensor] = {"w": module.w.detach(), "b": module.b.detach()}
        state = optimizer.init(theta)
        for step in range(1, T + 1):
            leaves = tree.leaves(theta)
            residual = x @ leaves["w"] + leaves["b"].sum() - y
            loss = (module.p.sigmoid() * residual.square()).mean() + leaves["b"].square().sum()
            grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            theta, state = rule(module).update(tree.detach(leaves), grads, state, step)
            theta = tree.detach(theta)
        return float((a @ theta["w"] + theta["b"].prod() - b).square().mean())

    found = {}
    for name in names:
        parameter = module.get_parameter(name)
        grads = torch.zeros(parameter.numel()).double()
        for position in range(parameter.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[position] += sign * 1e-5
                ends.append(value())
                with torch.no_grad():
                    parameter.view(-1)[position] -= sign * 1e-5
            grads[position] = (ends[0] - ends[1]) / 2e-5
        found[name] = grads.view_as(parameter)
    return found


@every_rule
def test_reverse_is_that_of_differences(rule: Callable[[Any], InnerOptimizer]) -> None:
    assert_close(hypergradient(Module(rule), ReverseUnroll(), episode()).grads, by_hand(rule, episode()), 1e-6)


@every_rule
@every_exact_strategy
def test_every_exact_strategy(row: Row, rule: Callable[[Any], InnerOptimizer]) -> None:
    module = Module(rule)
    expected = hypergradient(module, ReverseUnroll(), episode())
    assert_close(hypergradient(module, row.build(module), episode()).grads, expected.grads, 1e-8)


@every_rule
@pytest.mark.parametrize("strategy", [ReverseUnroll(), TruncatedReverse(2), GammaGreedy(0.9)], ids=["all", "last", "γ"])
def test_each_of_several_episodes_is_clipped_by_itself(strategy: Any, rule: Callable[[Any], InnerOptimizer]) -> None:
    data = [episode(), episode(20), episode(30)]
    stacked, looped = (hypergradient(Module(rule, episode_chunk_size=size), strategy, data) for size in (3, 1))
    assert_close(stacked.grads, looped.grads, 1e-10)
    assert_close(stacked.state.params, looped.state.params, 1e-12)


def test_values_per_step_begin_anew_with_every_run() -> None:
    """A warm start counts steps on, and takes the values of a run of T steps again."""
    short = Module(RULES["a rate per step"], inner_start="warm")
    first = hypergradient(short, ReverseUnroll(), episode())
    second = hypergradient(short, ReverseUnroll(), episode(), carry=first.carry)
    again = Module(RULES["a rate per step"])
    with torch.no_grad():
        again.w.copy_(first.state.params["w"])
        again.b.copy_(first.state.params["b"])
    assert_close(second.grads, hypergradient(again, ReverseUnroll(), episode()).grads, 1e-12)


def test_implicit_gradients_see_a_projection_at_a_fixed_point_only() -> None:
    module = Module(RULES["a proximal map"], inner_steps=400)
    expected = hypergradient(module, ReverseUnroll(), episode()).grads
    for solver in (Dense(), GMRES(max_iter=60, restart=60, tol=1e-10)):
        found = hypergradient(module, ImplicitGradient(solver, form="fixed_point"), episode()).grads
        assert_close({"p": found["p"]}, {"p": expected["p"]}, 1e-6)
    with pytest.raises(MisconfigurationError, match="Cannot use `ImplicitGradient` with the inner optimizer `SGD`"):
        hypergradient(module, ImplicitGradient(ConjugateGradient()), episode())
    decaying = Module(lambda m: SGD(0.1, weight_decay=PerStep([0.1, 0.2, 0.3])))
    with pytest.raises(MisconfigurationError, match="Cannot use `ImplicitGradient` with the inner optimizer `SGD`"):
        hypergradient(decaying, ImplicitGradient(ConjugateGradient()), episode())
    with pytest.raises(MisconfigurationError, match="Cannot use `FSLA`"):
        hypergradient(Module(RULES["projected onto a ball"], inner_steps=1, inner_start="warm"), FSLA(), episode())


def test_clipping_does_not_move_a_minimum() -> None:
    module = Module(lambda m: SGD(0.1, max_norm=1.0), inner_steps=800)
    exact = hypergradient(module, ReverseUnroll(), episode()).grads
    found = hypergradient(module, ImplicitGradient(Dense()), episode()).grads
    assert_close({"p": found["p"]}, {"p": exact["p"]}, 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(max_norm=0), r"Expected `SGD\(max_norm=...\)` to be a positive number, got 0"),
        (lambda: Adam(projection=3), r"Expected `Adam\(projection=...\)` to be a function of the inner parameters"),
        (lambda: PerStep([]), r"Expected `PerStep\(values\)` to be at least one value, got \[\]"),
        (lambda: SGD(PerStep([0.1, -1])), r"Expected `SGD\(lr at step 2=...\)` to be a non-negative number, got -1"),
        (
            lambda: run(SGD(projection=lambda params: {}), start(), 1),
            "Expected `what the projection of `SGD` returns` to be a mapping with the shapes",
        ),
    ],
)
def test_misuse_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
