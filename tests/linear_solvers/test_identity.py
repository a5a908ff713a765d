"""The identity is one term of a Neumann series."""

from __future__ import annotations

import torch

from lightning_bilevel.linear_solvers import Identity, Neumann
from tests.support.matrices import SPECTRUM, solve_flat, symmetric


def test_identity_is_one_neumann_term() -> None:
    matrix = symmetric(SPECTRUM)
    one = solve_flat(Identity(scale=0.2), matrix)
    torch.testing.assert_close(one, solve_flat(Neumann(terms=1, step_size=0.2), matrix))
    assert Identity(adapt=True).adapt
    assert not Identity().adapt
