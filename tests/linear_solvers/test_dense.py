"""The dense solver refuses a matrix that is singular."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.linear_solvers import Dense, LinearSystem
from tests.support.matrices import M, Spy, right_hand_side, with_eigenvalue


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("matrix", [torch.ones(M, M).double(), torch.zeros(M, M).double(), with_eigenvalue(0.0)])
def test_dense_refuses_a_singular_matrix(matrix: Tensor, dtype: torch.dtype) -> None:
    b = tree.map(lambda part: part.to(dtype), right_hand_side())
    message = (
        r"^Cannot use `Dense` with a singular matrix\. This is because the smallest singular value of the inner "
        r"Hessian is \S+, the largest \S+\. Add weight decay to the inner loss, or use "
        r"`ConjugateGradient\(damping=\.\.\.\)`\.$"
    )
    with pytest.raises(MisconfigurationError, match=message):
        Dense().solve(LinearSystem(Spy(matrix.to(dtype)), b))
