"""Unbiased hypergradient from random directional derivatives, in memory that does not grow with T."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.step import Mode
from lightning_bilevel.directions import DirectionSampler, Rademacher
from lightning_bilevel.errors import integer, one_of, value_error
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy, kept_of
from lightning_bilevel.strategies.slopes import checked_chunk_size, projected_mean
from lightning_bilevel.strategies.tangent_slopes import TangentSlopes
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

    With a ``guide``, another strategy whose cheap estimate has direction u: one derivative ⟨∇h, u⟩ is taken along
    u, exactly, and b − 1 along random directions projected to p = v − ⟨v, u⟩ u::

        ĝ = ⟨∇h, u⟩ u + 1/(b−1) Σ_i ⟨∇h, p_i⟩ p_i

    Unbiased whatever the guide, since E[p pᵀ] = I − u uᵀ. The error shrinks to about 1 − cos²(∇h, u) of the
    plain one: with w = ∇h − ⟨∇h, u⟩ u it is ((N−2)‖w‖² + 2 Σ w_i² u_i²)/(b−1) for Rademacher, N‖w‖²/(b−1) for
    Gaussian directions. Several episodes of a batch are looped, each with its own u. Guides: ``TruncatedReverse``,
    ``GammaGreedy``, ``ImplicitGradient``.

    Args:
        num_directions: b, the number of directions.
        directions: the sampler; one v covers all outer parameters jointly.
        chunk_size: directions pushed at once; the inner run is repeated per chunk. ``None`` picks the largest
            that fits a memory budget.
        guide: a strategy whose estimate becomes the first direction; needs ``num_directions >= 2``.
        mode: engine, see :mod:`lightning_bilevel.calculus.tangents`.

    Raises:
        ValueError: a bad ``num_directions``, ``chunk_size`` or ``mode``.

    >>> ForwardGradient(num_directions=8).unbiased
    True
    """

    exact = False
    unbiased = True
    differentiates = frozenset({"run"})
    memory = "O(M · chunk)"
    cost = "T steps + T · b tangents"
    weighs_steps = True
    direction_parallel = True

    def __init__(
        self,
        num_directions: int = 16,
        directions: DirectionSampler | None = None,
        chunk_size: int | None = None,
        guide: HypergradientStrategy | None = None,
        mode: Mode = "auto",
    ) -> None:
        self.num_directions = integer("ForwardGradient(num_directions=...)", num_directions)
        if guide is not None and num_directions < 2:
            raise value_error("ForwardGradient(num_directions=...)", "at least 2 with a guide", num_directions)
        self.directions = directions if directions is not None else Rademacher()
        self.chunk_size = checked_chunk_size("ForwardGradient", chunk_size)
        self.guide = guide
        self.mode = one_of("ForwardGradient(mode=...)", Mode, mode)
        # A stack would have one u, that of the mean, where a loop has one per episode.
        self.supports_stacking = guide is None

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the forward gradient; see :meth:`HypergradientStrategy.estimate`."""
        # Before the guide draws anything: θ_T is that of a run without one.
        slopes = TangentSlopes(problem, carry.inner, phi, episode, self.mode, self.chunk_size)
        u, kept = self._guided(problem, carry, phi, episode, call)
        grads = projected_mean(slopes, self.directions, self.num_directions, phi, call, known=u)
        return slopes.result(grads)._replace(kept=kept)

    def members(self) -> Mapping[str, HypergradientStrategy]:
        """Return the guide."""
        return {} if self.guide is None else {"guide": self.guide}

    def _guided(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> tuple[Params | None, dict[str, Params]]:
        """Return the guide's estimate at length 1, ``None`` where it has no direction, and what the guide carries."""
        if self.guide is None:
            return None, {}
        # Every process needs the same u, so the guide's own directions are not sharded. They are none of ours: u has
        # to be independent of them.
        own = Call(call.key.fold_in("guide"), step=call.step)
        guess = self.guide.estimate(problem, carry.of("guide"), phi, episode, own)
        kept = kept_of("guide", guess)
        length = tree.norm(guess.grads)
        if torch.isfinite(length) and length > 0:
            return tree.expand(tree.scale(guess.grads, 1 / length), 1), kept
        if not problem.findings.get(_NO_DIRECTION):
            problem.findings[_NO_DIRECTION] = True
            rank_zero_warn(
                f"The guide `{type(self.guide).__name__}` gave an estimate of norm {length.item()}; "
                "`ForwardGradient` goes on without it where that happens."
            )
        return None, kept


_NO_DIRECTION = "the guide of a forward gradient gave no direction"
"""Key of :attr:`BilevelProblem.findings`."""
