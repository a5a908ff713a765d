"""A multiple of the identity, or of a preconditioner, in place of the inverse."""

from __future__ import annotations

from typing_extensions import override

from lightning_bilevel.errors import combination_error, number
from lightning_bilevel.linear_solvers.base import LinearSolver, LinearSystem, Solution


class Identity(LinearSolver):
    r"""Take no product with A at all: the Hessian-free estimate.

    .. math:: x = s\, P b

    with P = I unless the system has a preconditioner. Biased, whatever A is, for P = I with
    ‖x − A⁻¹b‖ ≤ max_i abs(s − 1/λ_i) ‖b‖; it equals ``Neumann(terms=1, step_size=s)`` from zero. For positive definite
    A and P the product bᵀx is positive, as bᵀA⁻¹b is. Memory O(M), no products; a system's x0 is not used.

    Use it where Hessian products cost too much and the direction matters more than the length. Not
    where A is ill-conditioned: use :class:`~lightning_bilevel.linear_solvers.ConjugateGradient`.

    With ``adapt`` it asks for the inner optimizer's own preconditioner, P = −∂θ_{T+1}/∂(∇g): for SGD its learning
    rate, for Adam the diagonal of its step. ``ImplicitGradient`` puts it into the system.

    Paper: Liu, Simonyan and Yang (2019), DARTS (there s is the inner learning rate); Choe et al. (2023),
    Making Scalable Meta Learning Practical (SAMA, arXiv 2310.05674), for the adaptation.

    Args:
        scale: s, the multiple.
        adapt: take the inner optimizer's preconditioner for P.

    Raises:
        ValueError: ``scale`` is not a positive number.

    >>> import torch
    >>> system = LinearSystem(lambda v: v, {"w": torch.tensor([2.0])})
    >>> Identity(scale=0.5).solve(system).value
    {'w': tensor([1.])}
    >>> adam = system._replace(precondition=lambda v: {"w": v["w"] / 4})
    >>> Identity(scale=0.5, adapt=True).solve(adam).value
    {'w': tensor([0.2500])}
    """

    supports_stacking = True

    def __init__(self, scale: float = 1.0, adapt: bool = False) -> None:
        self.scale = number("Identity(scale=...)", scale, above=0)
        self.adapt = self.wants_preconditioner = adapt

    @override
    def solve(self, system: LinearSystem) -> Solution:
        """Return s P b.

        Raises:
            MisconfigurationError: ``adapt``, and the system has no preconditioner.
        """
        if self.adapt and system.precondition is None:
            raise combination_error(
                "`Identity(adapt=True)` with a linear system that has no preconditioner",
                "there is no inner optimizer whose preconditioner could be taken",
                "Use `Identity(scale=...)` or `ConjugateGradient()`",
            )
        x = system.b if system.precondition is None else system.precondition(system.b)
        return Solution({name: self.scale * x[name].detach() for name in system.b}, None, 0, None)
