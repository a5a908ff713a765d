"""Unbiased hypergradient from random directional derivatives, in memory that does not grow with T."""

from __future__ import annotations

from typing_extensions import override

from lightning_bilevel.calculus.step import Mode
from lightning_bilevel.directions import DirectionSampler, Rademacher
from lightning_bilevel.errors import one_of
from lightning_bilevel.problem import BilevelProblem, Episode, InnerState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.directional import DirectionalStrategy, Guide
from lightning_bilevel.strategies.slopes import Slopes
from lightning_bilevel.strategies.tangent_slopes import TangentSlopes
from lightning_bilevel.tree import Params


class ForwardGradient(DirectionalStrategy):
    r"""ĝ = (1/b) Σ_i ⟨∇h, v_i⟩ v_i, with ⟨∇h, v⟩ = d Z_T v + c v and Z_t v = A_t Z_{t-1} v + B_t v.

    Unbiased, since E[v vᵀ] = I gives E[⟨∇h, v⟩ v] = E[v vᵀ] ∇h = ∇h. Variance: E‖ĝ − ∇h‖² = (N−1)/b ‖∇h‖² for
    Rademacher directions; see :mod:`lightning_bilevel.directions` for the others.

    Memory: M × ``chunk_size``, flat in T. Cost: T steps and b tangents pushed through each, 1–2 plain steps per
    direction and step.

    The choice for long inner runs whose graph does not fit, where a biased estimate misleads. Not for short
    runs: there :class:`ReverseUnroll` is exact and cheaper. With few outer parameters (N ≤ b) use
    :class:`ForwardUnroll`, or ``Orthogonal()`` directions, which are exact at b = N.

    Source: (FG)²U, arXiv 2406.14095, eq. 8–10, Lemma 3.1, Algorithm 1.

    ``guide`` and ``remember`` spend some of the b derivatives on directions that are known to matter, exactly, and the
    others on what these leave over; see :class:`~lightning_bilevel.strategies.directional.DirectionalStrategy`.
    Unbiased whatever they are. The error shrinks to about 1 − cos² of the plain one, where cos is that of ∇h and their
    span: with w the rest of ∇h and u one of them alone, ((N−2)‖w‖² + 2 Σ w_i² u_i²)/(b−1) for Rademacher,
    N‖w‖²/(b−1) for Gaussian directions.

    - A guide is a strategy with a cheap, biased estimate of today's hypergradient: ``TruncatedReverse``,
      ``GammaGreedy``, ``ImplicitGradient``. It costs what it costs alone, ``TruncatedReverse(1)`` one more inner run.
      Several episodes of a batch are looped, each with its own.
    - The memory is made of the estimates before; it costs N floats, carried on and saved. It pays where ∇h changes
      little over N/b estimates. Momentum in the outer optimizer averages noise away as well, and takes part of that
      gain. Errors of successive estimates are no longer independent: at a rate at which plain SGD is barely stable
      without a memory, it may not be so with one.

    Args:
        num_directions: b, the number of directions.
        directions: the sampler; one v covers all outer parameters jointly.
        chunk_size: directions pushed at once; the inner run is repeated per chunk. ``None`` picks the largest
            that fits a memory budget.
        guide: a strategy whose estimate becomes the first direction, or a list of them; at most b − 1 are used.
        mode: engine, see :mod:`lightning_bilevel.calculus.tangents`.
        remember: whether the estimates before become a direction, after those of the guides.

    Raises:
        ValueError: a bad argument, or one direction with a guide or a memory, which need two.

    >>> ForwardGradient(num_directions=8).unbiased
    True
    >>> from lightning_bilevel import TruncatedReverse
    >>> ForwardGradient(num_directions=16, guide=TruncatedReverse(1), remember=True).remember
    True
    """

    exact = False
    unbiased = True
    differentiates = frozenset({"run"})
    memory = "O(M · chunk)"
    cost = "T steps + T · b tangents"
    weighs_steps = True

    def __init__(
        self,
        num_directions: int = 16,
        directions: DirectionSampler | None = None,
        chunk_size: int | None = None,
        guide: Guide = None,
        mode: Mode = "auto",
        remember: bool = False,
    ) -> None:
        super().__init__(num_directions, directions or Rademacher(), chunk_size, guide, remember)
        self.mode = one_of("ForwardGradient(mode=...)", Mode, mode)

    @property
    def one_slope(self) -> bool:  # type: ignore[override]
        """Whether it takes one direction, whose entries are ±1."""
        return self.num_directions == 1 and isinstance(self.directions, Rademacher)

    @override
    def small(self, outer_size: int) -> HypergradientStrategy:
        few = super().small(outer_size)
        return few if self.members() else ForwardGradient(1, Rademacher(), self.chunk_size, mode=self.mode)

    @override
    def slopes(self, problem: BilevelProblem, start: InnerState, phi: Params, episode: Episode) -> Slopes:
        return TangentSlopes(problem, start, phi, episode, self.mode, self.chunk_size)
