"""Unbiased hypergradient from random directional derivatives, in memory that does not grow with T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import Mode
from lightning_bilevel.directions import DirectionSampler, Rademacher
from lightning_bilevel.errors import MisconfigurationError, integer, one_of, value_error
from lightning_bilevel.host import Trainer, rank_zero_warn
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.chunks import DirectionalRun, checked_chunk_size
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
        mode: engine, see :mod:`lightning_bilevel.calculus.autodiff`.

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
        self.stacks = guide is None
        self._warned = False

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the forward gradient; see :meth:`HypergradientStrategy.estimate`."""
        runs = DirectionalRun(problem, memory, phi, episode, self.mode)
        u = self._guiding_direction(problem, memory, phi, episode, call)
        guided = int(u is not None)
        total = tree.zeros_like(phi)
        # Direction 0 is the guide's, if there is one; the others are random.
        for first, last in runs.chunks(*call.bounds(self.num_directions), self.chunk_size):
            v = self.directions.draw(call.key, max(first - guided, 0), last - guided, phi)
            share = call.shard[1] / (self.num_directions - guided)
            weights = torch.full((last - first,), share, dtype=torch.float64)
            if u is not None and last > 1:  # else no random direction is in this chunk
                v = tree.add(v, tree.outer(tree.inner_products(v, u), u), alpha=-1)
            if u is not None and first == 0:
                v = {name: torch.cat([u[name][None], values]) for name, values in v.items()}
                weights[0] = call.shard[1]
            derivatives = runs.derivatives(v)
            total = tree.add(total, tree.combine(weights.to(derivatives) * derivatives, v))
        return runs.hypergradient(total)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the guide cannot work with."""
        return [] if self.guide is None else self.guide.all_refusals(problem)

    def check_trainer(self, trainer: Trainer) -> None:
        """Let the guide look at the Trainer."""
        if self.guide is not None:
            self.guide.check_trainer(trainer)

    def carried(self) -> list[Tensor]:
        """Return what the guide carries."""
        return [] if self.guide is None else self.guide.carried()

    def state_dict(self) -> dict[str, Any]:
        """Return the guide's state."""
        return {} if self.guide is None else {"guide": self.guide.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the guide's state."""
        if self.guide is not None and "guide" in state_dict:
            self.guide.load_state_dict(state_dict["guide"])

    def _guiding_direction(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Params | None:
        """Return the guide's estimate at length 1, or ``None`` where it has no direction."""
        if self.guide is None:
            return None
        # Every process needs the same u, so the guide's own directions are not shared out. They are none of ours:
        # u has to be independent of them.
        own = Call(call.key.fold_in("guide"), step=call.step)
        guess = self.guide.estimate(problem, memory, phi, episode, own).grads
        length = tree.norm(guess)
        if torch.isfinite(length) and length > 0:
            return tree.scale(guess, 1 / length)
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The guide `{type(self.guide).__name__}` gave an estimate of norm {length.item()}; "
                "`ForwardGradient` goes on without it where that happens."
            )
        return None
