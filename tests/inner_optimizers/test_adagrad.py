"""Adagrad's falling rate, in closed form."""

from __future__ import annotations

import torch

from lightning_bilevel.inner_optimizers import Adagrad
from tests.support.optimizers import run


def test_steps_along_a_constant_gradient_fall_as_the_root_of_their_number() -> None:
    """θ_T = θ_0 − lr sign(g) Σ_t 1/√t, whatever the size of g."""
    theta, slope = torch.ones(2, dtype=torch.float64), torch.tensor([1e-3, -20.0], dtype=torch.float64)
    steps = sum(t**-0.5 for t in range(1, 6))
    found = run(Adagrad(lr=0.1, eps=0.0), {"w": theta}, 5, lambda params, step: {"w": slope})
    torch.testing.assert_close(found["w"], theta - 0.1 * steps * slope.sign())
