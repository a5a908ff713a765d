"""Hypergradient from the implicit function theorem at the end of the inner run."""

from __future__ import annotations

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import outer_value_and_grads
from lightning_bilevel.calculus.runs import run, vector_jacobian
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import MisconfigurationError, combination_error, value_error
from lightning_bilevel.kernels.inner_gradient import inner_gradient
from lightning_bilevel.linear_solvers import LinearSolver, LinearSystem
from lightning_bilevel.linear_solvers.base import MatVec
from lightning_bilevel.problem import Batch, BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.tree import Params


class ImplicitGradient(HypergradientStrategy):
    r"""ĝ = c − x ∂²g/∂θ∂φ with H x = d, H = ∂²g/∂θ², d = ∂f/∂θ, c = ∂f/∂φ, all at θ_T.

    Exact where θ_T minimizes g and the linear system is solved; biased before. The linear solver makes
    the variants: :class:`Neumann` (at the inner learning rate: AID-FP), :class:`ConjugateGradient` (AID-CG, iMAML,
    HOAG), :class:`Nystrom`, :class:`Identity` (Hessian-free; with ``adapt=True`` the inner optimizer's own
    preconditioner P = −∂θ_{T+1}/∂(∇g) in place of I, learning rate included, as in SAMA).

    Memory: O(M + N) and one graph of the inner gradient; no graph of the run. Cost: T inner steps, one Hessian
    product per solver iteration, one mixed product. H is taken on the first spare inner batch of the episode (one
    beyond the T that are used), else on the last one used; the mixed product on the second spare one, else on H's.

    Needs a θ_T near a minimum and, for Neumann and CG, H positive definite. Parameters shared by both levels need
    ``proximal > 0`` (iMAML): else nothing ties the minimum to φ. An inner optimizer that depends on φ (a
    learned learning rate) does not move the minimum: refused.

    Source: (FG)²U, arXiv 2406.14095, eq. 24–28; survey, arXiv 2207.11719, eq. 66–74.

    Args:
        solver: solves H x = d. ``Neumann(terms=10, step_size=lr)`` with the inner learning rate is the safe first
            choice; undamped conjugate gradients need a positive definite H, which a network rarely has.

    Raises:
        ValueError: ``solver`` is not a linear solver.

    >>> from lightning_bilevel.linear_solvers import Identity
    >>> ImplicitGradient(solver=Identity(scale=0.1)).solver.scale
    0.1
    """

    exact = False
    unbiased = False
    differentiates = frozenset({"inner_gradient"})
    memory = "O(M + N)"
    cost = "T steps + K Hessian products + 1 mixed product"

    def __init__(self, solver: LinearSolver) -> None:
        if not isinstance(solver, LinearSolver):
            raise value_error(
                "ImplicitGradient(solver=...)", "a linear solver such as `Neumann(10, step_size=lr)`", solver
            )
        self.solver = solver
        self.supports_stacking = solver.supports_stacking

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the implicit hypergradient; see :meth:`HypergradientStrategy.estimate`."""
        state, metrics = run(problem, problem.start(carry.inner, phi), phi, problem.batches(episode))
        value, d, c, observed = outer_value_and_grads(problem, state, phi, episode)
        step = inner_step(problem)
        for_hessian, for_mixed = _spare(problem, episode)
        hessian, mixed = step.products(state, phi, for_hessian)
        if for_mixed is not for_hessian:
            _, mixed = step.products(state, phi, for_mixed)
        precondition = None
        if self.solver.wants_preconditioner:
            precondition = _preconditioner(problem, state, phi, for_hessian)
        solution = self.solver.solve(LinearSystem(hessian, d, precondition=precondition))
        if solution.residual is not None:
            metrics = {**metrics, "linear_residual": solution.residual}
        grads = tree.sub(c, mixed(solution.value))
        return Hypergradient(value, grads, state, metrics, observed=observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the implicit function theorem cannot see in ``problem``."""
        found = []
        if problem.shared and not problem.traits.proximal:
            found.append(
                combination_error(
                    "`ImplicitGradient` with parameters shared by both levels and `proximal=0`",
                    "the minimum of the inner loss does not depend on where the inner run starts",
                    "Set `BilevelModule(proximal=...)`, or use `ReverseUnroll` or `ForwardGradient`",
                )
            )
        if problem.traits.learned():
            found.append(
                combination_error(
                    "`ImplicitGradient` with an inner optimizer that depends on the outer parameters",
                    "the minimum of the inner loss does not depend on how it is reached",
                    "Use `ReverseUnroll` or `ForwardGradient`",
                )
            )
        if problem.solver is not None and self.solver.wants_preconditioner:
            found.append(
                combination_error(
                    f"`{type(self.solver).__name__}(adapt=True)` with `solve_inner`",
                    "there is no inner optimizer whose preconditioner could be taken",
                    "Use `Identity(scale=...)` or `ConjugateGradient()`",
                )
            )
        return found


def _spare(problem: BilevelProblem, episode: Episode) -> tuple[Batch, Batch]:
    """Return the batches for the Hessian and for the mixed product."""
    taken = len(episode.inner) if problem.solver is not None else problem.inner_steps
    spare = list(episode.inner[taken:]) or [episode.inner[(taken - 1) % len(episode.inner)]]
    return spare[0], spare[min(1, len(spare) - 1)]


def _preconditioner(problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> MatVec:
    """Return v ↦ P v with P = −∂θ_{T+1}/∂(∇g), the derivative of the optimizer's next update by its gradient."""
    theta = tree.leaves(state.params)
    with torch.enable_grad():
        loss, _ = problem.inner_loss(theta, phi, batch, state.buffers)
        with inner_gradient():
            gradient = tree.leaves(tree.grad(loss, theta))
        params, _ = problem.update(tree.detach(theta), gradient, state.opt_state, phi, state.steps + 1)
    return lambda v: tree.scale(vector_jacobian(params, gradient, v), -1.0)
