"""GammaGreedy against its definition by hand, its limits, and the setting of its theorem."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bilevel import Episode, GammaGreedy, ReverseUnroll, TruncatedReverse, hypergradient, tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.tree import Params
from tests.support.problems import (
    INNER_OPTIMIZERS,
    Mlp,
    Quadratic,
    RidgeBlackBox,
    RidgeSolver,
    assert_close,
    assert_optimum,
    episodes,
    plain_value,
    train,
)
from tests.support.seeds import forked, masks

GAMMAS = [0.0, 0.5, 0.99, 1.0]

Rule = Callable[[list[Tensor], Tensor, Tensor, dict[str, Tensor], int], tuple[Tensor, dict[str, Tensor]]]
"""(hyperparameters, θ, ∇g, state, step) to the next θ and state of one parameter."""


def descent(h: Any, p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    return p - h[0] * g, {}


def momentum(h: Any, p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    lr, mu, dampening, weight_decay = h
    g = g + weight_decay * p
    m = g if step == 1 else mu * state["m"] + (1 - dampening) * g
    return p - lr * m, {"m": m}


def adam(h: Any, p: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    lr, beta1, beta2, eps, weight_decay = h
    g = g + weight_decay * p
    zero = torch.zeros_like(p)
    m = beta1 * state.get("m", zero) + (1 - beta1) * g
    v = beta2 * state.get("v", zero) + (1 - beta2) * g**2
    return p - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps), {"m": m, "v": v}


RULES: dict[str, Rule] = {"SGD": descent, "momentum": momentum, "Adam": adam}

both_ways = pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])


def by_hand(module: Mlp, episode: Episode, gamma: float, rule: Rule) -> Params:
    """Return c + Σ_t γ^{T−t} ∇f(θ_t) ∂θ_t/∂φ at constant θ_{t-1} and optimizer state, and γ^T ∇f(θ_0) ∂θ_0/∂φ."""
    module = deepcopy(module)
    theta, phi = module.inner_named(), module.outer_named()
    own = {name: value for name, value in phi.items() if name not in theta}
    state: dict[str, dict[str, Tensor]] = {name: {} for name in theta}
    total = {name: torch.zeros_like(value) for name, value in phi.items()}

    def outer_gradients() -> tuple[Params, Params]:
        value = module.outer_loss(episode.outer)
        grads = torch.autograd.grad(value, [*theta.values(), *own.values()], allow_unused=True)
        return tree.like(theta, grads[: len(theta)]), tree.like(own, grads[len(theta) :])

    d, c = outer_gradients()
    total.update({name: d[name] for name in theta if name in phi})
    for t in range(module.inner_steps):
        loss = module.inner_loss(episode.inner[t % len(episode.inner)])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        after = {}
        for (name, p), g in zip(theta.items(), grads, strict=True):
            after[name], new = rule(list(module.log_hyperparameters.exp()), p.detach(), g, state[name], t + 1)
            state[name] = tree.detach(new)
        moved = deepcopy(module)
        for name, p in moved.inner_named().items():
            p.data.copy_(after[name].detach())
        previous, module = module, moved
        theta, own = module.inner_named(), {name: module.get_parameter(name) for name in own}
        d, c = outer_gradients()
        sources = [previous.get_parameter(name) for name in own]
        values = torch.autograd.grad(list(after.values()), sources, [d[name] for name in after], allow_unused=True)
        direct = tree.like(own, values)
        total = {name: gamma * value + direct.get(name, torch.zeros_like(value)) for name, value in total.items()}
    return {name: value + c.get(name, torch.zeros_like(value)) for name, value in total.items()}


# --- The definition ---


@both_ways
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("inner", RULES)
def test_definition_on_an_mlp(inner: str, gamma: float, shared: bool) -> None:
    module, (episode,) = Mlp(inner, shared), episodes(1)
    result = hypergradient(module, GammaGreedy(gamma), episode)
    assert_close(result.grads, by_hand(module, episode, gamma, RULES[inner]), 1e-10)
    trained = train(module, episode)
    assert_close(result.state.params, tree.detach(trained.inner_named()), 1e-12)
    torch.testing.assert_close(result.value, trained.outer_loss(episode.outer).detach())


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8}, {"shared": True, "proximal": 0.4}], ids=str)
def test_definition_on_a_quadratic(options: dict[str, Any], gamma: float) -> None:
    # With the momentum buffer held constant, dθ_t/dφ of one step is ηB whatever the momentum.
    episode = Quadratic().episode()
    expected = {"phi": 0.3 * Quadratic().phi.detach()}
    if "shared" in options:
        expected = {"theta": torch.zeros(4, dtype=torch.float64), **expected}
    for t in range(6):
        module = Quadratic(max(t, 1), **options)
        theta = module.solution(episode).theta if t else module.theta.detach()
        pulled = gamma ** (5 - t) * module.C.T @ (module.C @ theta - episode.outer)
        if t:
            expected["phi"] = expected["phi"] + module.lr * module.B.T @ pulled
        if module.shared:
            expected["theta"] = expected["theta"] + (module.lr * module.proximal if t else 1.0) * pulled
    assert_close(hypergradient(Quadratic(5, **options), GammaGreedy(gamma), episode).grads, expected, 1e-11)


# --- Limits ---


@pytest.mark.parametrize("inner", INNER_OPTIMIZERS)
def test_gamma_to_zero_is_truncation_after_one_step(inner: str) -> None:
    module, (episode,) = Mlp(inner), episodes(1)
    truncated = hypergradient(module, TruncatedReverse(steps=1), episode).grads
    assert_close(hypergradient(module, GammaGreedy(0), episode).grads, truncated, 1e-12)
    errors = [
        tree.norm(tree.sub(hypergradient(module, GammaGreedy(gamma), episode).grads, truncated)).item()
        for gamma in (1e-3, 1e-6)
    ]
    assert errors[1] / errors[0] == pytest.approx(1e-3, rel=0.01)


def test_shared_parameters_keep_the_start_only() -> None:
    module, (episode,) = Mlp("SGD", shared=True), episodes(1)
    start = torch.autograd.grad(module.outer_loss(episode.outer), list(module.inner_named().values()))
    grads = hypergradient(module, GammaGreedy(0.7), episode).grads
    assert_close(
        {name: grads[name] for name in module.inner_named()},
        {name: 0.7**3 * d for name, d in zip(module.inner_named(), start, strict=True)},
        1e-11,
    )


# --- Theorem 4.6: A = I and γ = 1 − η ---


class Isotropic(Quadratic):
    """A = I; with ``linear``, an outer loss whose gradient is the same everywhere."""

    def __init__(self, linear: bool, at_optimum: bool = False, **options: Any) -> None:
        super().__init__(6, **options)
        self.A, self.linear = torch.eye(4, dtype=torch.float64), linear
        if at_optimum:
            self.theta.data.copy_(self.optimum(self.episode()).theta)

    def outer_loss(self, batch):
        if not self.linear:
            return super().outer_loss(batch)
        return batch @ self.C @ self.theta + 0.5 * self.rho * self.phi.square().sum()


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize(("linear", "at_optimum"), [(True, False), (False, True)], ids=["linear", "at the optimum"])
def test_theorem_is_an_equality_where_the_outer_gradient_stays(linear: bool, at_optimum: bool, shared: bool) -> None:
    module = Isotropic(linear, at_optimum, shared=shared)
    episode = module.episode()
    grads = hypergradient(module, GammaGreedy(gamma=1 - module.lr), episode).grads
    assert_close(grads, hypergradient(module, ReverseUnroll(), episode).grads, 1e-12)
    if not linear:
        assert_close(grads, module.solution(episode).grads, 1e-12)
    with pytest.raises(AssertionError, match=r"^(theta|phi): "):  # at another γ it is none
        assert_close(hypergradient(module, GammaGreedy(0.9 - module.lr), episode).grads, grads, 1e-2)


def test_theorem_is_a_descent_direction_elsewhere() -> None:
    module = Isotropic(linear=False)
    for seed in range(5):
        episode = module.episode(seed)
        grads = hypergradient(module, GammaGreedy(gamma=1 - module.lr), episode).grads
        exact = module.solution(episode).grads
        assert tree.dot(grads, exact) > 0.1 * tree.dot(exact, exact)
        assert tree.norm(tree.sub(grads, exact)) > 1e-2 * tree.norm(exact)


# --- A user's own solver is a run of one step ---


@pytest.mark.parametrize("gamma", GAMMAS)
def test_exact_through_a_solver(gamma: float) -> None:
    module = RidgeSolver()
    episode = module.episode()
    result, optimum = hypergradient(module, GammaGreedy(gamma), episode), module.optimum(episode)
    assert_optimum(result, optimum)


def test_refuses_a_solver_without_derivatives() -> None:
    module = RidgeBlackBox()
    message = "^Cannot use `GammaGreedy` with `solve_inner` and `differentiable_solve = False`"
    with pytest.raises(MisconfigurationError, match=message):
        hypergradient(module, GammaGreedy(), module.episode())


# --- Masks, arguments ---


def test_masks_of_earlier_outer_losses_leave_the_run_as_it_is() -> None:
    class Dropout(Mlp):
        def __init__(self) -> None:
            super().__init__("SGD")
            self.net.first.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, 0.3))

    module, (episode,) = Dropout(), episodes(1)
    result = hypergradient(module, GammaGreedy(0.9), episode, seed=3)
    with forked(masks(3)):
        trained = train(module, episode)
    assert_close(result.state.params, tree.detach(trained.inner_named()), 1e-12)
    assert result.value.item() == pytest.approx(plain_value(module, episode, seed=3), rel=1e-12)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan"), True, None, "0.9"], ids=str)
def test_bad_gamma(gamma: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `GammaGreedy\(gamma=\.\.\.\)` to be a number in \[0, 1\], got"):
        GammaGreedy(gamma)
