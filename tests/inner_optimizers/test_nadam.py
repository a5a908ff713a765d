"""NAdam's momenta over many steps, in closed form."""

from __future__ import annotations

import torch

from lightning_bilevel.inner_optimizers import NAdam
from tests.support.optimizers import run


def test_a_constant_gradient_gives_signs_and_the_momenta_cancel() -> None:
    """With g constant, m_t = (1 − β1ᵗ) g and √v̂_t = |g|: θ moves by the sum of the published weights."""
    beta, decay, theta = 0.8, 0.3, torch.ones(2, dtype=torch.float64)
    mu = [beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in range(1, 8)]
    total, product = 0.0, 1.0
    for t in range(1, 6):
        product *= mu[t - 1]
        total += (1 - mu[t - 1]) / (1 - product) + mu[t] * (1 - beta**t) / (1 - product * mu[t])
    slope = torch.tensor([1e-3, -20.0], dtype=torch.float64)
    optimizer = NAdam(lr=0.1, betas=(beta, 0.9), eps=0.0, momentum_decay=decay)
    found = run(optimizer, {"w": theta}, 5, lambda params, step: {"w": slope})
    torch.testing.assert_close(found["w"], theta - 0.1 * total * slope.sign())
