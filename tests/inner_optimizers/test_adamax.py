"""Adamax's running maximum."""

from __future__ import annotations

import torch

from lightning_bilevel.inner_optimizers import Adamax
from tests.support.optimizers import run


def test_a_large_gradient_is_remembered() -> None:
    """u_t = β2^{t-1} |g_1| while that is more than what comes: with β1 = 0 a step is lr g_t / u_t."""
    gradients = torch.tensor([8.0, 1.0, -1.0], dtype=torch.float64)
    found = run(
        Adamax(lr=0.1, betas=(0.0, 0.5), eps=0.0),
        {"w": torch.zeros(1, dtype=torch.float64)},
        3,
        lambda params, step: {"w": gradients[step - 1 : step]},
    )
    torch.testing.assert_close(found["w"], -0.1 * torch.tensor([8 / 8 + 1 / 4 - 1 / 2], dtype=torch.float64))
