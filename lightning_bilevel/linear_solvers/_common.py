"""What the solvers share: one vector in place of a tree, columns of the matrix, a warning given once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.errors import nonfinite_error
from lightning_bilevel.linear_solvers.base import MatVec
from lightning_bilevel.tree import Params


def flat_system(matvec: MatVec, b: Params) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return (v ↦ A v, b) on vectors of shape ``(M,)``, without a graph.

    Their dtype is the widest of ``b`` and at least float32: recurrences in bfloat16 lose what the
    products still know. Products run in the caller's grad mode and get tensors of ``b``'s dtypes.
    """
    flat = tree.flatten(b).detach()
    dtype = torch.promote_types(flat.dtype, torch.float32)

    def apply(v: Tensor) -> Tensor:
        return tree.flatten(matvec(tree.unflatten(v, b))).detach().to(dtype)

    return apply, flat.to(dtype)


def columns(apply: Callable[[Tensor], Tensor], flat: Tensor, positions: Sequence[int], owner: str) -> Tensor:
    """Return the columns of A at ``positions``, of shape ``(M, len(positions))``; one product each.

    Raises:
        FloatingPointError: a product is nan or infinite, which decompositions report as something else.
    """
    matrix = flat.new_empty(flat.numel(), len(positions))
    for column, position in enumerate(positions):
        unit = torch.zeros_like(flat)
        unit[position] = 1
        matrix[:, column] = apply(unit)
    if not torch.isfinite(matrix).all():
        hint = "Look at the inner loss and at its second derivatives."
        raise nonfinite_error(f"Hessian products of `{owner}`", "nan or inf", hint)
    return matrix


class WarnsOnce:
    """Gives the first warning of an instance and keeps the others to itself."""

    _warned: bool = False

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=3)
