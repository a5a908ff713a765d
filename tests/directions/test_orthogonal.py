"""Orthogonal directions: orthogonal in a block, independent between blocks, uniform over rotations."""

from __future__ import annotations

import torch

from lightning_bilevel.directions import Orthogonal
from tests.support.seeds import key_of

N = 6


def test_orthogonal_blocks_are_orthogonal_and_independent() -> None:
    rows = Orthogonal().flat(key_of(seed=2), 0, 2 * N, torch.zeros(N, dtype=torch.float64))
    products = rows @ rows.T / N
    identity = torch.eye(N, dtype=torch.float64)
    torch.testing.assert_close(products[:N, :N], identity)
    torch.testing.assert_close(products[N:, N:], identity)
    assert products[:N, N:].abs().min() > 1e-6


def test_orthogonal_matrices_are_haar() -> None:
    # LAPACK alone gives R a negative diagonal almost always; without the signs E[Q₁₁] is far from 0.
    like = torch.zeros(3, dtype=torch.float64)
    blocks = torch.stack([Orthogonal().flat(key_of(estimate=i), 0, 3, like) for i in range(2000)])
    assert (blocks.mean(0).abs() <= 4 / 2000**0.5).all()  # each entry has variance 1
