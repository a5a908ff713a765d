"""Hypergradient from finite differences of the inner solution, without second derivatives."""

from __future__ import annotations

from contextlib import nullcontext
from functools import reduce

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import outer_gradients
from lightning_bilevel.directions import DirectionSampler, Gaussian
from lightning_bilevel.errors import integer, number
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.chunks import checked_chunk_size
from lightning_bilevel.strategies.perturbation import PerturbedRuns
from lightning_bilevel.strategies.rounding import CoarsestDtype, coarser, rounding_error, warn_of_rounding
from lightning_bilevel.tree import Params

_ENOUGH = 10.0
"""A warning is due where θ_T moves by less than so many times its rounding: slopes are then off by a tenth."""


class PZOBO(HypergradientStrategy):
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

    Source: PZOBO, arXiv 2110.07004, eq. 4–5 and 7, Algorithm 1.

    Args:
        num_directions: Q, the number of perturbed runs.
        mu: μ, in the units of φ.
        directions: the sampler.
        chunk_size: perturbed runs that are vectorized together; ``None`` chooses by device and kind of net.

    Raises:
        ValueError: a bad argument.

    >>> PZOBO(num_directions=4).second_order
    False
    """

    exact = False
    unbiased = False
    requires = "solve"
    second_order = False
    memory = "O(M · chunk)"
    cost = "Q + 1 inner runs"
    direction_parallel = True

    def __init__(
        self,
        num_directions: int = 1,
        mu: float = 1e-2,
        directions: DirectionSampler | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.num_directions = integer("PZOBO(num_directions=...)", num_directions)
        self.mu = number("PZOBO(mu=...)", mu, above=0)
        self.directions = directions if directions is not None else Gaussian()
        self.chunk_size = checked_chunk_size("PZOBO", chunk_size)
        self._looked = False

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the partial zeroth-order estimate; see :meth:`HypergradientStrategy.estimate`."""
        with CoarsestDtype() if not self._looked else nullcontext() as seen:
            runs = PerturbedRuns(problem, memory, phi, episode, self.chunk_size)
        value, d, c = outer_gradients(problem, runs.base.state, phi, episode)
        response = tree.zeros_like(phi)
        for first, last in runs.chunks(*call.bounds(self.num_directions)):
            u = self.directions.draw(call.key, first, last, phi)
            along = tree.combine(self._slopes(runs, u, d, seen), u)
            response = tree.add(response, along, alpha=call.shard[1] / self.num_directions)
        if runs.looped:
            self.chunk_size = 1  # one look is enough
        return Hypergradient(value, tree.add(c, response), runs.base.state, runs.base.metrics)

    def _slopes(self, runs: PerturbedRuns, u: Params, d: Params, seen: CoarsestDtype | None) -> Tensor:
        """Return ⟨(θ_T(φ + μ u_j) − θ_T(φ)) / μ, d⟩, shape ``(n,)``."""
        moved = runs.solutions(u, self.mu)
        differences = {name: moved[name] - value for name, value in runs.base.state.params.items()}
        if not self._looked:
            self._looked = True  # one look: each would wait for the device
            self._look_at_rounding(runs, differences, seen)
        return tree.inner_products(tree.scale(differences, 1 / self.mu), d)

    def _look_at_rounding(self, runs: PerturbedRuns, differences: Params, seen: CoarsestDtype | None) -> None:
        """Compare how far θ_T moves with μ, on average, with what rounding alone moves it.

        θ is rounded where it is stored. What the steps add to it has the rounding of the gradients, which may be
        computed in another dtype; a user's solver has no steps.
        """
        theta = runs.base.state.params
        dtype = reduce(coarser, (value.dtype for value in theta.values()))
        rounding = rounding_error(dtype) * tree.norm(theta)
        if runs.problem.solver is None and seen is not None and seen.dtype is not None:
            path = tree.norm(tree.sub(theta, runs.start.params))
            rounding = torch.hypot(rounding, rounding_error(seen.dtype) * path)
            dtype = coarser(dtype, seen.dtype)
        count = next(iter(differences.values())).shape[0]
        moves = (tree.norm(differences) / (rounding * count**0.5)).item()
        if moves < _ENOUGH:
            reason = f"with it, the inner solution moves by {moves:.2g} times its rounding"
            enough = f"about {2 * self.mu * _ENOUGH / moves:.1g}" if moves > 2 else "much more"  # below, it is noise
            warn_of_rounding("PZOBO", self.mu, dtype, reason, enough)
