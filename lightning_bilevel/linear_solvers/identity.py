"""A multiple of the identity in place of the inverse."""

from __future__ import annotations

from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.errors import number
from lightning_bilevel.linear_solvers.base import LinearSolver, MatVec, Solution
from lightning_bilevel.tree import Params


class Identity(LinearSolver):
    r"""Take no product with A at all: the Hessian-free estimate.

    .. math:: x = s\, b

    Biased, whatever A is, with ‖x − A⁻¹b‖ ≤ max_i abs(s − 1/λ_i) ‖b‖; it equals ``Neumann(terms=1, step_size=s)``.
    For positive definite A and s > 0 it keeps an acute angle with A⁻¹b. Memory O(M), no products.

    Use it where Hessian products cost too much and the direction matters more than the length. Not
    where A is ill-conditioned: use :class:`~lightning_bilevel.linear_solvers.ConjugateGradient`.

    With ``adapt`` the strategy that uses this solver, ``ImplicitGradient``, replaces I by the preconditioner
    of the inner optimizer (for Adam, the diagonal of its step). This solver only stores the flag: what
    it is handed says nothing about the optimizer.

    Paper: Liu, Simonyan and Yang (2019), DARTS (there s is the inner learning rate); Choe et al. (2023),
    Making Scalable Meta Learning Practical (SAMA, arXiv 2310.05674), for the adaptation.

    Args:
        scale: s, the multiple.
        adapt: ask ``ImplicitGradient`` for the inner optimizer's preconditioner in place of I.

    Raises:
        ValueError: ``scale`` is not a positive number.

    >>> import torch
    >>> Identity(scale=0.5).solve(lambda v: v, {"w": torch.tensor([2.0])}).value
    {'w': tensor([1.])}
    """

    blockwise = True

    def __init__(self, scale: float = 1.0, adapt: bool = False) -> None:
        self.scale = number("Identity(scale=...)", scale, above=0)
        self.adapt = adapt

    @override
    def solve(self, matvec: MatVec, b: Params) -> Solution:
        return Solution(tree.scale(tree.detach(b), self.scale), None, 0, None)
