"""Standard normal directions."""

from __future__ import annotations

import torch

from lightning_bilevel.directions import Gaussian
from tests.support.seeds import key_of


def test_the_fourth_moment_is_three() -> None:
    """Which makes its error (N + 1)/b, not (N − 1)/b."""
    rows = Gaussian().flat(key_of(), 0, 2000, torch.zeros(6, dtype=torch.float64))
    fourth = rows.pow(4).flatten()
    assert (fourth.mean() - 3).abs() <= 4 * fourth.std() / len(fourth) ** 0.5
