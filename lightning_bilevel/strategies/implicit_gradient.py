"""Hypergradient from the implicit function theorem at the end of the inner run."""

from __future__ import annotations

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import hessian_product, outer_gradients
from lightning_bilevel.calculus.inner_loop import run, vector_jacobian
from lightning_bilevel.errors import MisconfigurationError, combination_error, value_error
from lightning_bilevel.linear_solvers import Identity, LinearSolver
from lightning_bilevel.problem import Batch, BilevelProblem, Episode, Hypergradient, InnerState
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

    >>> ImplicitGradient(solver=Identity(scale=0.1)).solver.scale
    0.1
    """

    exact = False
    unbiased = False
    requires = "inner_loss"
    second_order = True
    memory = "O(M + N)"
    cost = "T steps + K Hessian products + 1 mixed product"

    def __init__(self, solver: LinearSolver) -> None:
        if not isinstance(solver, LinearSolver):
            raise value_error(
                "ImplicitGradient(solver=...)", "a linear solver such as `Neumann(10, step_size=lr)`", solver
            )
        self.solver = solver
        self.stacks = self.solver.blockwise

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the implicit hypergradient; see :meth:`HypergradientStrategy.estimate`."""
        state, metrics = run(problem, problem.start(memory, phi), phi, problem.batches(episode))
        value, d, c = outer_gradients(problem, state, phi, episode)
        for_hessian, for_mixed = _spare(problem, episode)
        hessian, mixed = hessian_product(problem, state, phi, for_hessian)
        if for_mixed is not for_hessian:
            _, mixed = hessian_product(problem, state, phi, for_mixed)
        if isinstance(self.solver, Identity) and self.solver.adapt:
            d = _preconditioned(problem, state, phi, for_hessian, d)
        solution = self.solver.solve(hessian, d)
        if solution.residual is not None:
            metrics = {**metrics, "linear_residual": solution.residual}
        return Hypergradient(value, tree.sub(c, mixed(solution.value)), state, metrics)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the implicit function theorem cannot see in ``problem``."""
        found = []
        if problem.shared and not problem.proximal:
            found.append(
                combination_error(
                    "`ImplicitGradient` with parameters shared by both levels and `proximal=0`",
                    "the minimum of the inner loss does not depend on where the inner run starts",
                    "Set `BilevelModule(proximal=...)`, or use `ReverseUnroll` or `ForwardGradient`",
                )
            )
        if problem.solver is None and problem.update_uses_phi:
            found.append(
                combination_error(
                    "`ImplicitGradient` with an inner optimizer that depends on the outer parameters",
                    "the minimum of the inner loss does not depend on how it is reached",
                    "Use `ReverseUnroll` or `ForwardGradient`",
                )
            )
        if problem.solver is not None and isinstance(self.solver, Identity) and self.solver.adapt:
            found.append(
                combination_error(
                    "`Identity(adapt=True)` with `solve_inner`",
                    "there is no inner optimizer whose preconditioner could be taken",
                    "Use `Identity(scale=...)` or `ConjugateGradient()`",
                )
            )
        return found


def _spare(problem: BilevelProblem, episode: Episode) -> tuple[Batch, Batch]:
    """Return the batches for the Hessian and for the mixed product."""
    spare = list(episode.inner[problem.inner_steps :]) or [problem.batches(episode)[-1]]
    return spare[0], spare[min(1, len(spare) - 1)]


def _preconditioned(problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch, d: Params) -> Params:
    """Return P d with P = −∂θ_{T+1}/∂(∇g), the derivative of the optimizer's next update by its gradient."""
    theta = tree.leaves(state.params)
    with torch.enable_grad():
        loss, _ = problem.inner_loss(theta, phi, batch, state.buffers)
        gradient = tree.leaves(tree.grad(loss, theta))
        params, _ = problem.update(tree.detach(theta), gradient, state.slots, phi, state.steps + 1)
        return tree.scale(vector_jacobian(params, gradient, d), -1.0)
