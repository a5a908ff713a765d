"""A problem of pure functions, without a module, so that hundreds of estimates take a second; guides on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bilevel import Episode, Hypergradient, HypergradientStrategy, tree
from lightning_bilevel.problem import BilevelProblem, Carry, InnerState
from lightning_bilevel.tree import Params
from tests.support.problems import draw
from tests.support.seeds import call_of

M, N = 3, 8
ETA, STEPS = 0.4, 2
A = torch.diag(torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64))
B, START, TARGET = draw(M, N, seed=1), draw(M, seed=2), draw(M, seed=3)
PHI = {"a": draw(2, 2, seed=4), "b": draw(4, seed=5)}
CARRY, EPISODE = Carry(InnerState({"w": START})), Episode([None], None)


def inner_loss(theta: Params, phi: Params, batch: Any, buffers: Params) -> tuple[Tensor, Params]:
    w = theta["w"]
    return 0.5 * w @ A @ w - w @ (B @ tree.flatten(phi)), buffers


def outer_loss(theta: Params, phi: Params, batch: Any, buffers: Params) -> Tensor:
    return 0.5 * (theta["w"] - TARGET).square().sum() + 0.1 * tree.flatten(phi).square().sum()


PROBLEM = BilevelProblem(
    inner_loss=inner_loss,
    outer_loss=outer_loss,
    update=lambda params, grads, opt_state, phi, step: (tree.add(params, grads, alpha=-ETA), opt_state),
    inner_steps=STEPS,
)


def closed_form() -> Tensor:
    """Return ∇h from θ_2 = (I − ηA)² θ_0 + (2I − ηA) ηBφ, a vector of N entries."""
    phi, decay, push = tree.flatten(PHI), torch.eye(M) - ETA * A, ETA * (2 * torch.eye(M) - ETA * A)
    w = decay @ decay @ START + push @ B @ phi
    return B.T @ push @ (w - TARGET) + 0.2 * phi


EXACT = closed_form()


def estimate(strategy: HypergradientStrategy, seed: int = 0, shard: tuple[int, int] = (0, 1)) -> Tensor:
    grads = strategy.estimate(PROBLEM, CARRY, PHI, EPISODE, call_of(seed, shard=shard)).grads
    assert list(grads) == list(PHI)
    return tree.flatten(grads)


class Given(HypergradientStrategy):
    """A guide that always points the same way."""

    exact = unbiased = False
    differentiates = frozenset()
    memory = cost = "O(1)"

    def __init__(self, direction: Tensor) -> None:
        self.direction = direction

    def estimate(self, *args: Any) -> Hypergradient:
        return Hypergradient(torch.tensor(0.0), tree.unflatten(self.direction, PHI), CARRY.inner, {})


def partly_right(cosine: float) -> Tensor:
    """Return a vector at a given cosine to ∇h."""
    exact, other = EXACT / EXACT.norm(), draw(N, seed=6)
    other = other - (other @ exact) * exact
    return 3 * (cosine * exact + (1 - cosine**2) ** 0.5 * other / other.norm())


GOOD, BAD = Given(partly_right(0.9)), Given(partly_right(-0.1))
