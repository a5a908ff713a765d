"""Hypergradient from finite differences of the inner solution, without second derivatives."""

from __future__ import annotations

from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.autodiff import outer_gradients
from lightning_bilevel.directions import DirectionSampler, Gaussian
from lightning_bilevel.directions.base import Key
from lightning_bilevel.errors import positive_integer
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.chunks import checked_chunk_size
from lightning_bilevel.strategies.perturbation import PerturbedRuns
from lightning_bilevel.strategies.zeroth_order import checked_mu
from lightning_bilevel.tree import Params


class PZOBO(HypergradientStrategy):
    r"""ĝ = c + (1/Q) Σ_j ⟨(θ_T(φ + μ u_j) − θ_T(φ)) / μ, d⟩ u_j with d = ∂f/∂θ_T, c = ∂f/∂φ, u_j ~ N(0, I).

    The response Jacobian dθ_T/dφ is estimated by finite differences, the outer loss is differentiated.
    Unbiased for the response smoothed over N(0, μ²I), so biased by O(μ) for ∇h. Directions are not normalized.
    With mini-batches in the episode this is PZOBO-S.

    Memory: one inner run (times ``chunk_size``). Cost: Q + 1 inner runs with gradients only. Every run starts from
    the same θ_0 with the same batches and masks; with ``inner_start="warm"`` that is the current θ, where the paper
    restarts from one fixed point.

    Good for black-box solvers and losses without second derivatives; with few directions and many outer
    parameters its variance is that of :class:`ForwardGradient` with b = Q.

    Source: PZOBO, arXiv 2110.07004, eq. 4–5 and 7, Algorithm 1.

    Args:
        num_directions: Q.
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
        self.num_directions = positive_integer("PZOBO(num_directions=...)", num_directions)
        self.mu = checked_mu("PZOBO", mu)
        self.directions = directions if directions is not None else Gaussian()
        self.chunk_size = checked_chunk_size("PZOBO", chunk_size)

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, key: Key
    ) -> Hypergradient:
        """Return the partial zeroth-order estimate; see :meth:`HypergradientStrategy.estimate`."""
        runs = PerturbedRuns(problem, memory, phi, episode, self.chunk_size)
        theta = runs.base.state.params
        value, d, c = outer_gradients(problem, runs.base.state, phi, episode)
        response = tree.zeros_like(phi)
        for first, last in runs.chunks(*key.bounds(self.num_directions)):
            u = self.directions.draw(key, first, last, phi)
            moved, _ = runs.at(u, self.mu)
            slopes = self._slopes(moved, theta, d)
            response = tree.add(response, tree.combine(slopes, u), alpha=key.share[1] / self.num_directions)
        return Hypergradient(value, tree.add(c, response), runs.base.state, runs.base.metrics)

    def _slopes(self, moved: Params, theta: Params, d: Params) -> Tensor:
        """Return ⟨(θ_T(φ + μ u_j) − θ_T(φ)) / μ, d⟩, shape ``(n,)``."""
        differences = {name: (moved[name] - value) / self.mu for name, value in theta.items()}
        return tree.inner_products(differences, d)
