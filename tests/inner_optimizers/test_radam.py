"""RAdam's two phases: derivatives on both sides of the change, by numbers and by tensors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from lightning_bilevel.inner_optimizers import RAdam
from tests.support.optimizers import run, start


@pytest.mark.parametrize("steps", [5, 6, 9])  # rectified from the sixth on
def test_derivatives_in_both_phases(steps: int) -> None:
    theta = start()["net.0.bias"]

    def solve(theta, beta1, beta2, eps):
        optimizer = RAdam(lr=0.1, betas=(beta1, beta2), eps=eps)
        return run(optimizer, {"net.0.bias": theta}, steps)["net.0.bias"]

    point = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.9, 0.1)]
    assert gradcheck(solve, [theta.requires_grad_(), *point], check_forward_ad=True, check_batched_forward_grad=True)
    torch.testing.assert_close(solve(theta, *point), solve(theta, 0.7, 0.9, 0.1))


def test_steps_before_it_are_those_of_momentum() -> None:
    """θ_1 = θ_0 − lr g, whatever the size of g."""
    slope = torch.tensor([1e-3, -20.0], dtype=torch.float64)
    found = run(RAdam(lr=0.1), {"w": torch.zeros(2, dtype=torch.float64)}, 1, lambda params, step: {"w": slope})
    torch.testing.assert_close(found["w"], -0.1 * slope)
