"""Directions of constant length."""

from __future__ import annotations

import torch

from lightning_bilevel.directions import Gaussian, Sphere
from tests.support.seeds import key_of


def test_it_is_a_gaussian_direction_brought_to_length() -> None:
    like, key = torch.zeros(6, dtype=torch.float64), key_of(seed=1)
    rows, drawn = Sphere().flat(key, 0, 5, like), Gaussian().flat(key, 0, 5, like)
    torch.testing.assert_close(rows, drawn * 6**0.5 / drawn.norm(dim=1, keepdim=True))
