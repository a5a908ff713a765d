"""Gradient descent with momentum, in closed form."""

from __future__ import annotations

import pytest
import torch

from lightning_bilevel.inner_optimizers import SGD
from tests.support.optimizers import run


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_steps_along_a_constant_gradient_add_up(momentum: float) -> None:
    """θ_T = θ_0 − lr g Σ_t (1 + μ + … + μ^(t−1))."""
    theta, slope = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    steps = sum(momentum**k for t in range(5) for k in range(t + 1))
    found = run(SGD(lr=0.1, momentum=momentum), {"w": theta}, 5, lambda params, step: {"w": slope})
    torch.testing.assert_close(found["w"], theta - 0.1 * steps * slope)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_number_of_a_step_may_be_a_tensor(step: int) -> None:
    optimizer = SGD(lr=0.1, momentum=0.9, dampening=0.5)
    params, grads, state = {"w": torch.ones(2)}, {"w": torch.randn(2)}, {"momentum": {"w": torch.randn(2)}}
    expected, slots = optimizer.update(params, grads, state, step)
    found, others = optimizer.update(params, grads, state, torch.tensor(float(step)))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(others, slots)
