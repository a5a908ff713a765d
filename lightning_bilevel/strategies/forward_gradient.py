"""Unbiased hypergradient from random directional derivatives, in memory that does not grow with T."""

from __future__ import annotations

from typing import ClassVar

from lightning_bilevel import tree
from lightning_bilevel.autodiff import Mode
from lightning_bilevel.directions import DirectionSampler, Rademacher
from lightning_bilevel.directions.base import Key
from lightning_bilevel.errors import positive_integer
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.chunks import DirectionalRun, check_mode, checked_chunk_size
from lightning_bilevel.tree import Params


class ForwardGradient(HypergradientStrategy):
    r"""ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i, with ⟨∇h, v⟩ = d Z_T v + c v and Z_t v = A_t Z_{t-1} v + B_t v.

    Unbiased, since E[v vᵀ] = I gives E[⟨∇h, v⟩ v] = E[v vᵀ] ∇h = ∇h. Variance: E‖ĝ − ∇h‖² = (N−1)/b ‖∇h‖² for
    Rademacher directions; see :mod:`lightning_bilevel.directions` for the others.

    Memory: M × ``chunk_size``, flat in T. Cost: T steps and b tangents pushed through each, 1–2 plain steps per
    direction and step.

    The choice for long inner runs whose graph does not fit, where a biased estimate misleads. Not for short
    runs: there :class:`ReverseUnroll` is exact and cheaper. With few outer parameters (N ≤ b) use
    :class:`ForwardUnroll`, or ``Orthogonal()`` directions, which are exact at b = N.

    Source: (FG)²U, arXiv 2406.14095, eq. 8–10, Lemma 3.1, Algorithm 1.

    Args:
        num_directions: b.
        directions: the sampler; one v covers all outer parameters jointly.
        chunk_size: directions pushed at once; the inner run is repeated per chunk. ``None`` picks the largest
            that fits a memory budget.
        mode: engine, see :mod:`lightning_bilevel.autodiff`.

    Raises:
        ValueError: a bad ``num_directions``, ``chunk_size`` or ``mode``.

    >>> ForwardGradient(num_directions=8).unbiased
    True
    """

    exact = False
    unbiased = True
    requires = "solve"
    second_order = True
    memory = "O(M · chunk)"
    cost = "T steps + T · b tangents"
    direction_parallel: ClassVar[bool] = True

    def __init__(
        self,
        num_directions: int = 16,
        directions: DirectionSampler | None = None,
        chunk_size: int | None = None,
        mode: Mode = "auto",
    ) -> None:
        self.num_directions = positive_integer("ForwardGradient(num_directions=...)", num_directions)
        self.directions = directions if directions is not None else Rademacher()
        self.chunk_size = checked_chunk_size("ForwardGradient", chunk_size)
        self.mode = check_mode("ForwardGradient", mode)

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, key: Key
    ) -> Hypergradient:
        """Return the forward gradient; see :meth:`HypergradientStrategy.estimate`."""
        runs = DirectionalRun(problem, memory, phi, episode, self.mode)
        total = tree.zeros_like(phi)
        for first, last in runs.chunks(0, self.num_directions, self.chunk_size):
            v = self.directions.draw(key, first, last, phi)
            total = tree.add(total, tree.combine(runs.derivatives(v), v), alpha=1 / self.num_directions)
        return runs.hypergradient(total)
