"""BOME against Algorithm 1 on a quadratic, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_bilevel import BOME, SGD, Adam, hypergradient
from lightning_bilevel.tree import Params
from tests.support.problems import Quadratic, assert_close

LR = 0.2


class Warm(Quadratic):
    """The quadratic, whose θ goes on from step to step, with another inner optimizer."""

    def __init__(self, inner_steps: int = 3, optimizer: Any = None, sign: float = 1.0) -> None:
        super().__init__(inner_steps, lr=LR)
        self.inner_start, self.optimizer, self.sign = "warm", optimizer or SGD(LR), sign

    def inner_loss(self, batch):
        return self.sign * super().inner_loss(batch)

    def configure_inner_optimizer(self):
        return self.optimizer


class ByHand:
    """g = ½ θᵀAθ − θᵀ(Bφ + c₀), f = ½‖Cθ − e‖² + ½ρ‖φ‖²."""

    def __init__(self, module: Warm, decay: float = 0.0) -> None:
        episode = module.episode()
        self.A = module.A.numpy() + decay * np.eye(4)
        self.B, self.C, self.c0, self.e = (v.numpy() for v in (module.B, module.C, episode.inner[0], episode.outer))
        self.rho, self.steps = module.rho, module.inner_steps

    def gap(self, theta: np.ndarray, phi: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        b = self.B @ phi + self.c0
        end = np.linalg.solve(self.A, b)
        end = end + np.linalg.matrix_power(np.eye(4) - LR * self.A, self.steps) @ (theta - end)
        q = 0.5 * theta @ self.A @ theta - theta @ b - (0.5 * end @ self.A @ end - end @ b)
        return q, self.A @ theta - b, -self.B.T @ (theta - end)

    def step(self, theta: np.ndarray, phi: np.ndarray, strategy: BOME) -> tuple[np.ndarray, np.ndarray, float]:
        q, q_theta, q_phi = self.gap(theta, phi)
        d, c = self.C.T @ (self.C @ theta - self.e), self.rho * phi
        square = q_theta @ q_theta + q_phi @ q_phi
        barrier = strategy.eta * (q if strategy.barrier == "gap" else square)
        weight = max(0.0, (barrier - d @ q_theta - c @ q_phi) / square)
        return theta - strategy.lr * (d + weight * q_theta), c + weight * q_phi, weight


@pytest.mark.parametrize("strategy", [BOME(0.02), BOME(0.02, 0.1, "gap"), BOME(0.05, 3.0)], ids=["", "gap", "eta"])
def test_steps_are_those_of_the_algorithm(strategy: BOME) -> None:
    module = Warm()
    by_hand, carry = ByHand(module), None
    theta, phi, weights = module.theta.detach().numpy(), module.phi.detach().numpy().copy(), []
    for _ in range(6):
        result = hypergradient(module, strategy, module.episode(), carry=carry)
        theta, grad, weight = by_hand.step(theta, phi, strategy)
        np.testing.assert_allclose(result.grads["phi"], grad, rtol=1e-10)
        np.testing.assert_allclose(result.state.params["theta"], theta, rtol=1e-10)
        np.testing.assert_allclose(result.metrics["barrier_weight"], weight, rtol=1e-10)
        np.testing.assert_allclose(result.value, 0.5 * np.sum((by_hand.C @ theta - by_hand.e) ** 2) + 0.15 * phi @ phi)
        carry, phi = result.carry, phi - 0.05 * grad
        with torch.no_grad():
            module.phi.copy_(torch.from_numpy(phi))
        weights.append(weight)
    assert max(weights) > 0


def test_the_weight_is_zero_where_both_losses_fall_together() -> None:
    module = Warm()
    episode = module.episode()
    with torch.no_grad():  # far out, where both gradients point home
        module.theta.fill_(50.0)
    result = hypergradient(module, BOME(eta=1e-3), episode)
    assert result.metrics["barrier_weight"] == 0
    assert_close(result.grads, {"phi": module.rho * module.phi.detach()})


def moved(module: Warm) -> Params:
    return hypergradient(module, BOME(0.02), module.episode()).grads


def test_weight_decay_and_ascent_belong_to_the_gap() -> None:
    decayed = Warm(optimizer=SGD(LR, weight_decay=0.4))
    expected = ByHand(decayed, 0.4).step(decayed.theta.detach().numpy(), decayed.phi.detach().numpy(), BOME(0.02))[1]
    np.testing.assert_allclose(moved(decayed)["phi"], expected, rtol=1e-10)
    assert_close(moved(Warm(optimizer=SGD(LR, maximize=True), sign=-1.0)), moved(Warm()), 1e-12)


def test_the_run_begins_with_a_fresh_optimizer_every_time() -> None:
    """θ takes a plain step and has no moments to go on with; a carried count would spoil Adam's first ones."""
    module = Warm(optimizer=Adam(0.05))
    first = hypergradient(module, BOME(1e-12), module.episode())
    again = hypergradient(module, BOME(1e-12), module.episode(), carry=first.carry)
    assert_close(again.grads, first.grads, 1e-6)
    assert again.state.steps == 2
