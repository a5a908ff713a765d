"""MEHA against its step and its fixed point on a quadratic, in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_bilevel import MEHA, SGD, Adam, hypergradient
from lightning_bilevel.errors import MisconfigurationError
from tests.strategies.test_bome import LR, ByHand, Warm
from tests.support.problems import assert_close


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_are_those_of_the_algorithm(decay: float) -> None:
    module, strategy = Warm(1, SGD(LR, weight_decay=decay)), MEHA(gamma=2.0, penalty=3.0, power=0.3)
    by_hand, carry = ByHand(module, decay), None
    theta, phi = module.theta.detach().numpy(), module.phi.detach().numpy().copy()
    omega = theta
    for k in range(5):
        result = hypergradient(module, strategy, module.episode(), carry=carry)
        b, weight = by_hand.B @ phi + by_hand.c0, 3.0 * (k + 1) ** 0.3
        omega = omega - LR * (by_hand.A @ omega - b + (omega - theta) / 2.0)
        grad = by_hand.rho * phi - weight * by_hand.B.T @ (theta - omega)
        d = by_hand.C.T @ (by_hand.C @ theta - by_hand.e)
        theta = theta - LR * (d / weight + by_hand.A @ theta - b - (theta - omega) / 2.0)
        np.testing.assert_allclose(result.grads["phi"], grad, rtol=1e-10)
        np.testing.assert_allclose(result.state.params["theta"], theta, rtol=1e-10)
        carry, phi = result.carry, phi - 0.05 * grad
        with torch.no_grad():
            module.phi.copy_(torch.from_numpy(phi))


@pytest.mark.parametrize(("gamma", "penalty"), [(1.0, 10.0), (10.0, 100.0)])
def test_it_comes_to_its_fixed_point(gamma: float, penalty: float) -> None:
    module, strategy, carry = Warm(1), MEHA(gamma, penalty, power=0.0), None
    problem, phi = module.functional().problem, module.functional().phi()
    carry = hypergradient(module, strategy, module.episode()).carry
    for _ in range(1500):
        result = hypergradient(problem, strategy, module.episode(), phi=phi, carry=carry)
        carry = result.carry
    by_hand = ByHand(module)
    A, B, S = by_hand.A, by_hand.B, by_hand.C.T @ by_hand.C
    minimum = np.linalg.solve(A, B @ module.phi.detach().numpy() + by_hand.c0)
    d = by_hand.C.T @ (by_hand.C @ minimum - by_hand.e)
    P = np.linalg.solve(A + np.eye(4) / gamma, A)
    expected = by_hand.rho * module.phi.detach().numpy() + B.T @ P @ np.linalg.solve(P @ A + S / penalty, d)
    np.testing.assert_allclose(result.grads["phi"], expected, rtol=1e-6)


def test_both_steps_have_moments_of_their_own() -> None:
    module, strategy = Warm(1, Adam(0.05)), MEHA()
    first = hypergradient(module, strategy, module.episode())
    second = hypergradient(module, strategy, module.episode(), carry=first.carry)
    names = {"theta", "exp_avg:theta", "exp_avg_sq:theta"}
    assert set(first.kept["omega"]) == names
    assert int(second.kept["k"]["k"]) == 2
    assert not torch.equal(second.kept["omega"]["exp_avg:theta"], second.state.opt_state["exp_avg"]["theta"])


def test_ascent_is_descent_on_the_other_sign() -> None:
    up, down = Warm(1, SGD(LR, maximize=True), sign=-1.0), Warm(1)
    one, other = (hypergradient(module, MEHA(), module.episode()) for module in (up, down))
    assert_close(one.grads, other.grads, 1e-12)
    assert_close(one.state.params, other.state.params, 1e-12)


def test_several_steps_are_refused() -> None:
    with pytest.raises(MisconfigurationError, match="^Cannot use `MEHA` with `inner_steps=3`"):
        hypergradient(Warm(), MEHA(), Warm().episode())
