"""The implicit function theorem at the end of the inner run."""

from __future__ import annotations

from itertools import chain, cycle
from typing import Literal

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import Condition
from lightning_bilevel.calculus.outer import outer_value_and_grads
from lightning_bilevel.calculus.runs import run, vector_jacobian
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import MisconfigurationError, combination_error, flag, one_of, value_error
from lightning_bilevel.kernels.inner_gradient import inner_gradient
from lightning_bilevel.linear_solvers import ConjugateGradient, Identity, LinearSolver, LinearSystem, Neumann
from lightning_bilevel.linear_solvers.base import MatVec
from lightning_bilevel.problem import Batch, BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.stationarity import distance, unseen_by_the_minimum, warn_of_another_map
from lightning_bilevel.tree import Params

Form = Literal["gradient", "fixed_point"]
Batches = Literal["one", "fresh"]


class ImplicitGradient(HypergradientStrategy):
    r"""ĝ = c − x ∂r/∂φ with (∂r/∂s)ᵀ x = d, where r(s, φ) = 0 holds at the end s of the inner run.

    d = ∂f/∂θ and c = ∂f/∂φ at θ_T. There are two forms of r, the same where both apply:

    - ``"gradient"``, s = θ: r = ∇_θ g, so that H x = d with H = ∂²g/∂θ². Here g is the inner loss *with* the weight
      decay λ of ``SGD``, ``Adam``, ``RMSprop`` and ``Adagrad``, g + λ/2 ‖θ‖², and with the other sign under
      ``maximize``: what the inner optimizer makes stationary (see :meth:`BilevelProblem.stationary`). A learned decay
      is differentiated through it.
    - ``"fixed_point"``, s = (θ, optimizer state): r = s − Ω(s, φ), so that (I − ∂Ω/∂s)ᵀ x = d and
      ĝ = c + x ∂Ω/∂φ. It holds for any update: decoupled decay (``AdamW``), projections, a rule of your own.
      The system is not symmetric: :class:`Neumann` (at ``step_size=1``: reverse mode through one more step, again and
      again), :class:`Dense` or :class:`Identity` (one more step); the others are refused.

    Exact where r(θ_T) = 0 and the linear system is solved; biased before: ``inner_residual`` is logged, about the
    distance from θ_T to there relative to ‖θ_T‖, ‖r‖ ‖x‖ / (‖d‖ ‖s‖). A warning says so once if θ_T is a fixed point
    of the updates and no stationary point of g. The linear solver makes the variants: :class:`Neumann` (at the inner
    learning rate: AID-FP), :class:`ConjugateGradient` (AID-CG, iMAML, HOAG), :class:`Nystrom`, :class:`Identity`
    (Hessian-free; with ``adapt=True`` the inner optimizer's own preconditioner P = −∂θ_{T+1}/∂(∇g) in place of I,
    learning rate included, as in SAMA).

    Memory: O(M + N) and one graph of the inner gradient, or of one step; no graph of the run. Cost: T inner steps, one
    product per solver iteration, one mixed product. ∂r/∂s is taken on the first spare inner batch of the episode (one
    beyond the T that are used), else on the last one used; the mixed product on the second spare one, else on the
    same. A mini-batch for all products makes the inverse of a noisy matrix, which is biased by the noise.
    ``batches="fresh"`` takes the spare batches in turn, one for each product, and the last of them for the mixed
    product; without spare ones, those of the run. The sum of the series is then unbiased (stocBiO), at the cost of one
    graph of the inner gradient for each product.

    With ``warm_start=True`` the solver starts from the x of the last estimate, which is carried on and saved with a
    checkpoint; processes and episodes average it. φ moves little from step to step, so that a few products follow the
    solution: with ``Neumann(K, step_size=β)`` they are K steps x ← x − β(Hx − d) (AmIGO). Solvers that do not iterate
    make no use of it.

    Needs a θ_T near a fixed point and, for Neumann and CG on gradients, H positive definite; on fixed points an Ω that
    contracts. Parameters shared by both levels need ``proximal > 0`` (iMAML): else nothing ties the minimum to φ. A
    learned learning rate does not move a fixed point: refused. Not where the inner run stops early on purpose.

    Source: (FG)²U, arXiv 2406.14095, eq. 24–28; survey, arXiv 2207.11719, eq. 66–74; for fixed points Grazzi et al.,
    arXiv 2006.16218, eq. 6 and 7.

    Args:
        solver: solves the system. ``"safe"`` is ``ConjugateGradient(max_iter=10, damping=1e-2)``, which stands some
            negative curvature, as a network has it. ``Neumann(terms=10, step_size=lr)`` with the inner learning rate
            takes no step further than the inner run did.
        form: what holds at θ_T.
        warm_start: whether the solver goes on from the last solution.
        batches: ``"one"`` for all products of an estimate, or a ``"fresh"`` one for each, for ``Neumann`` only.

    Raises:
        ValueError: ``solver`` is not a linear solver, or ``form`` or ``batches`` none of the two.
        MisconfigurationError: ``form="fixed_point"`` with a solver that needs a symmetric system or a preconditioner,
            or ``batches="fresh"`` with one that takes all products for those of one matrix.

    >>> from lightning_bilevel.linear_solvers import Identity, Neumann
    >>> ImplicitGradient(solver=Identity(scale=0.1)).form
    'gradient'
    >>> ImplicitGradient(Neumann(terms=20, step_size=1.0), form="fixed_point").form
    'fixed_point'
    """

    exact = False
    unbiased = False
    differentiates = frozenset({"inner_gradient"})
    memory = "O(M + N)"
    cost = "T steps + K Hessian products + 1 mixed product"

    def __init__(
        self,
        solver: LinearSolver | Literal["safe"] = "safe",
        form: Form = "gradient",
        warm_start: bool = False,
        batches: Batches = "one",
    ) -> None:
        if isinstance(solver, str) and solver == "safe":  # a name, which a saved configuration can have
            solver = ConjugateGradient(max_iter=10, damping=1e-2)
        if not isinstance(solver, LinearSolver):
            raise value_error(
                "ImplicitGradient(solver=...)", "a linear solver such as `Neumann(10, step_size=lr)`", solver
            )
        self.solver = solver
        self.form: Form = one_of("ImplicitGradient(form=...)", Form, form)
        self.warm_start = flag("ImplicitGradient(warm_start=...)", warm_start)
        self.batches: Batches = one_of("ImplicitGradient(batches=...)", Batches, batches)
        self.supports_stacking = solver.supports_stacking and not warm_start  # x is carried as a mean over episodes
        if batches == "fresh":
            _check_of_fresh_batches(solver)
        if form == "fixed_point":
            self.differentiates = frozenset({"run"})  # of it, one step
            _check_of_fixed_points(solver)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the implicit hypergradient; see :meth:`HypergradientStrategy.estimate`."""
        state, metrics = run(problem, problem.start(carry.inner, phi), phi, problem.batches(episode))
        value, d, c, observed = outer_value_and_grads(problem, state, phi, episode)
        (first, *others), last = self._batches(problem, episode)
        condition = self._condition(problem, state, phi, first)
        mixed = condition.mixed if last is first else self._condition(problem, state, phi, last).mixed
        right = {**tree.zeros_like(condition.residual), **d}
        precondition = _preconditioner(self.solver, problem, state, phi, first)
        symmetric = self.form == "gradient"
        product, series = condition.transposed, condition.series
        if others:
            series = None
            rest = cycle([*others, first])
            products = chain([product], (self._condition(problem, state, phi, batch).transposed for batch in rest))
            product = lambda v: next(products)(v)  # noqa: E731
        guess = carry.strategy.get("x")
        x0 = guess if guess is not None and guess.keys() == right.keys() else None
        system = LinearSystem(product, right, x0, precondition, symmetric=symmetric and not others, series=series)
        x, _, _, left = self.solver.solve(system)
        at = {name: value for name, value in state.flat().items() if name in right}
        metrics = {**metrics, "inner_residual": distance(condition.residual, x, right, at)}
        if left is not None:
            metrics["linear_residual"] = left
        if symmetric and problem.solver is None:
            warn_of_another_map(problem, state, phi, condition.residual, "ImplicitGradient")
        kept = {"x": tree.map(torch.clone, x)} if self.warm_start else {}
        return Hypergradient(value, tree.sub(c, mixed(x)), state, metrics, kept, observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the implicit function theorem cannot see in ``problem``."""
        traits = problem.traits
        unstationary = traits.unstationary() if self.form == "gradient" else ""
        learned = traits.learned() if self.form == "gradient" else traits.rates()
        found = unseen_by_the_minimum(problem, "ImplicitGradient", () if unstationary else learned)
        if unstationary:
            found.append(
                combination_error(
                    f"`ImplicitGradient` with the inner optimizer `{unstationary}`",
                    "where it stays, the gradient of no function is zero: its weight decay, say, is not part of the "
                    "gradient",
                    'Use `ImplicitGradient(Neumann(terms=K, step_size=1.0), form="fixed_point")`, or an optimizer '
                    "whose decay is part of the gradient, such as `Adam(weight_decay=...)`",
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

    def _condition(self, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> Condition:
        if self.form == "gradient":
            return inner_step(problem.stationary()).stationarity(state, phi, batch)
        return inner_step(problem).fixed_point(state, phi, batch)

    def _batches(self, problem: BilevelProblem, episode: Episode) -> tuple[list[Batch], Batch]:
        """Return the batches for the system, and that for the mixed product."""
        if self.form == "fixed_point" and problem.solver is not None:  # one step, with all of them
            (batch,) = problem.batches(episode)
            return [batch], batch
        taken = len(episode.inner) if problem.solver is not None else problem.inner_steps
        spare = list(episode.inner[taken:])
        if self.batches == "one":
            spare = spare or [episode.inner[(taken - 1) % len(episode.inner)]]
            return spare[:1], spare[min(1, len(spare) - 1)]
        spare = spare or list(episode.inner)
        return spare[:-1] or spare, spare[-1]


def _check_of_fixed_points(solver: LinearSolver) -> None:
    """Refuse a solver that is not for (I − ∂Ω/∂s)ᵀ x = d."""
    solver.check(LinearSystem(lambda v: v, {}, symmetric=False))
    if solver.wants_preconditioner:
        raise combination_error(
            f'`{type(solver).__name__}(adapt=True)` with `ImplicitGradient(form="fixed_point")`',
            "the update is preconditioned already",
            "Use `Identity()`, which is the gradient through one more step",
        )


def _check_of_fresh_batches(solver: LinearSolver) -> None:
    """Refuse a solver whose recurrence holds for the products of one matrix only."""
    if isinstance(solver, (Neumann, Identity)):
        return
    name = type(solver).__name__
    raise combination_error(
        f'`{name}` with `ImplicitGradient(batches="fresh")`',
        f"each product would be that of another matrix, and `{name}` takes them for one",
        'Use `Neumann(terms=K, step_size=lr)`, or `batches="one"` and a larger batch',
    )


def _preconditioner(
    solver: LinearSolver, problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch
) -> MatVec | None:
    """Return v ↦ P v: what the solver makes of the inner loss, or the inner optimizer's own where it wants that.

    That is P = −∂θ_{T+1}/∂(∇g), the derivative of the optimizer's next update by its gradient.

    Of −g where the optimizer ascends, as in :meth:`BilevelProblem.stationary`.
    """
    if not solver.wants_preconditioner:
        whole = problem.stationary()
        return solver.make_preconditioner(lambda at: whole.inner_loss(at, phi, batch, state.buffers)[0], state.params)
    theta = tree.leaves(state.params)
    with torch.enable_grad():
        loss, _ = problem.inner_loss(theta, phi, batch, state.buffers)
        with inner_gradient():
            gradient = tree.leaves(tree.grad(loss, theta))
        params, _ = problem.update(tree.detach(theta), gradient, state.opt_state, phi, state.steps + 1)
    sign = 1.0 if problem.maximize else -1.0
    return lambda v: tree.scale(vector_jacobian(params, gradient, v), sign)
