"""Hypergradient from finite differences of the inner solution, without second derivatives."""

from __future__ import annotations

from contextlib import nullcontext
from functools import reduce

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import OuterEvaluation, outer_value_and_grads
from lightning_bilevel.directions import DirectionSampler, Gaussian
from lightning_bilevel.errors import number
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.strategies.directional import DirectionalStrategy, Guide
from lightning_bilevel.strategies.perturbation import PerturbedRuns, coarsest
from lightning_bilevel.strategies.rounding import CoarsestDtype, coarser, first_look, rounding_error, warn_of_rounding
from lightning_bilevel.strategies.slopes import Slopes
from lightning_bilevel.tree import Params

_ENOUGH = 10.0
"""A warning is due where θ_T moves by less than so many times its rounding: slopes are then off by a tenth."""


class PZOBO(DirectionalStrategy):
    r"""ĝ = c + (1/Q) Σ_j ⟨(θ_T(φ + μ u_j) − θ_T(φ)) / μ, d⟩ u_j with d = ∂f/∂θ_T, c = ∂f/∂φ, u_j ~ N(0, I).

    The response Jacobian dθ_T/dφ is estimated by finite differences, the outer loss is differentiated.
    Unbiased for the response smoothed over N(0, μ²I), so biased by O(μ) for ∇h. Directions are not normalized.
    With mini-batches in the episode this is PZOBO-S.

    Memory: one inner run (times ``chunk_size``). Cost: Q + 1 inner runs with gradients only. Every run starts from
    the same θ_0 with the same batches and masks; with ``inner_start="warm"`` that is the current θ, where the paper
    restarts from one fixed point.

    Good for black-box solvers and losses without second derivatives; with few directions and many outer
    parameters its variance is that of :class:`ForwardGradient` with b = Q. Choose μ so that θ_T moves by well more than
    its rounding: a warning tells when ‖θ_T(φ + μu) − θ_T(φ)‖ is less than ten times that of θ_T, in the dtype of θ, and
    of θ_T − θ_0, in the least precise dtype in which the steps compute anything (bfloat16 under ``bf16-mixed``).

    ``guide`` and ``remember`` are those of :class:`ForwardGradient`, for the response ∇h − c: c is taken off what a
    guide says. Along what they know, slopes are differences over ±μ √N, with a random sign.

    Source: PZOBO, arXiv 2110.07004, eq. 4–5 and 7, Algorithm 1.

    Args:
        num_directions: Q, the number of perturbed runs.
        mu: μ, in the units of φ.
        directions: the sampler.
        chunk_size: perturbed runs that are vectorized together; ``None`` chooses by device and kind of net.
        guide: a strategy whose estimate becomes the first direction, or a list of them; at most Q − 1 are used.
        remember: whether the estimates before become a direction, after those of the guides.

    Raises:
        ValueError: a bad argument, or one direction, the default, with a guide or a memory, which need two.

    >>> PZOBO(num_directions=4).differentiates
    frozenset()
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    memory = "O(M · chunk)"
    cost = "Q + 1 inner runs"

    def __init__(
        self,
        num_directions: int = 1,
        mu: float = 1e-2,
        directions: DirectionSampler | None = None,
        chunk_size: int | None = None,
        guide: Guide = None,
        remember: bool = False,
    ) -> None:
        super().__init__(num_directions, directions or Gaussian(), chunk_size, guide, remember)
        self.mu = number("PZOBO(mu=...)", mu, above=0)

    @override
    def slopes(self, problem: BilevelProblem, start: InnerState, phi: Params, episode: Episode) -> Slopes:
        look = first_look(problem, "PZOBO", self.mu)
        with coarsest(problem, start, phi, episode) if look else nullcontext() as seen:
            runs = PerturbedRuns(problem, start, phi, episode, self.chunk_size)
        end = outer_value_and_grads(problem, runs.base.state, phi, episode)
        return _Responses(runs, end, self.mu, seen)


class _Responses(Slopes):
    """Slopes of f along the response of θ_T, by differences over μ: ⟨(θ_T(φ + μ u) − θ_T(φ)) / μ, d⟩."""

    differences = True

    def __init__(self, runs: PerturbedRuns, end: OuterEvaluation, mu: float, seen: CoarsestDtype | None) -> None:
        self._runs, self._end, self._mu = runs, end, mu
        self.explicit = end.c
        self._seen = seen  # until the first difference has been compared with its rounding

    def chunk_size(self) -> int:
        return self._runs.chunk_size

    def along(self, directions: Params) -> Tensor:
        moved = self._runs.solutions(directions, self._mu)
        differences = {name: moved[name] - value for name, value in self._runs.base.state.params.items()}
        if self._seen is not None:
            self._look_at_rounding(differences, self._seen.dtype)
            self._seen = None
        return tree.rows_dot(tree.scale(differences, 1 / self._mu), self._end.d)

    def result(self, grads: Params) -> Hypergradient:
        state, metrics = self._runs.base
        total = tree.add(self._end.c, grads)
        return Hypergradient(self._end.value, total, state, metrics, observed=self._end.observed)

    def _look_at_rounding(self, differences: Params, computed: torch.dtype | None) -> None:
        """Compare how far θ_T moves with μ, on average, with what rounding alone moves it.

        θ is rounded where it is stored. What the steps add to it has the rounding of the gradients, which may be
        computed in another dtype; a user's solver has no steps.
        """
        theta = self._runs.base.state.params
        dtype = reduce(coarser, (value.dtype for value in theta.values()))
        rounding = rounding_error(dtype) * tree.norm(theta)
        if self._runs.problem.solver is None and computed is not None:
            path = tree.norm(tree.sub(theta, self._runs.start.params))
            rounding = torch.hypot(rounding, rounding_error(computed) * path)
            dtype = coarser(dtype, computed)
        count = tree.count(differences)
        moves = (tree.norm(differences) / (rounding * count**0.5)).item()
        if moves < _ENOUGH:
            reason = f"with it, the inner solution moves by {moves:.2g} times its rounding"
            enough = f"about {2 * self._mu * _ENOUGH / moves:.1g}" if moves > 2 else "much more"  # below, it is noise
            warn_of_rounding("PZOBO", self._mu, dtype, reason, enough)
