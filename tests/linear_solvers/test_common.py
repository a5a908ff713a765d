"""What the solvers share: one vector of a wider dtype in place of a tree, finite columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightning_bilevel import tree
from lightning_bilevel.linear_solvers import Dense, LinearSolver, LinearSystem, Nystrom
from lightning_bilevel.tree import Params
from tests.support.matrices import NAN_MATRIX, SPECTRUM, Spy, class_name, right_hand_side, solve_flat, symmetric
from tests.support.tables import every_solver


@every_solver
def test_mixed_dtypes_keep_their_names_shapes_and_dtypes(make: Callable[[], LinearSolver]) -> None:
    matrix, exact = symmetric(SPECTRUM), right_hand_side()
    dtypes = {"w": torch.bfloat16, "s": torch.float32, "b": torch.float64}
    b = {name: part.to(dtypes[name]) for name, part in exact.items()}
    seen = []

    def matvec(v: Params) -> Params:
        seen.append({name: part.dtype for name, part in v.items()})
        return Spy(matrix)(v)

    value = make().solve(LinearSystem(matvec, b)).value
    assert {name: part.dtype for name, part in value.items()} == dtypes
    assert all(types == dtypes for types in seen)
    expected = solve_flat(make(), matrix, exact)
    torch.testing.assert_close(tree.flatten(value), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_solver
def test_low_precision(make: Callable[[], LinearSolver], dtype: torch.dtype) -> None:
    matrix, b = symmetric(SPECTRUM), tree.map(lambda part: part.to(dtype), right_hand_side())
    value = make().solve(LinearSystem(Spy(matrix), b)).value
    torch.testing.assert_close(tree.flatten(value).double(), solve_flat(make(), matrix), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("solver", [Dense(), Nystrom()], ids=class_name)
def test_decompositions_refuse_nan(solver: LinearSolver) -> None:
    message = rf"^Expected the Hessian products of `{class_name(solver)}` to be finite, got nan or inf\. Look at the "
    with pytest.raises(FloatingPointError, match=message):
        solver.solve(LinearSystem(Spy(NAN_MATRIX), right_hand_side()))
