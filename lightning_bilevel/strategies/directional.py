"""Estimates by slopes along random directions, and what is known before these are drawn: guides and a memory."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_bilevel import tree
from lightning_bilevel.directions import DirectionSampler
from lightning_bilevel.errors import flag, integer, value_error
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy, kept_of
from lightning_bilevel.strategies.slopes import Slopes, checked_chunk_size, projected_mean
from lightning_bilevel.strategies.span import Span, wide
from lightning_bilevel.tree import Params

Guide = HypergradientStrategy | Sequence[HypergradientStrategy] | None

MEMORY = "memory"
"""Name of what a memory carries in :attr:`Hypergradient.kept`, and of its direction."""


class DirectionalStrategy(HypergradientStrategy):
    r"""ĝ = Σ_j s(q_j) q_j + 1/(b−k) Σ_i s(p_i) p_i, with p = v − Σ_j ⟨v, q_j⟩ q_j and slopes s(v) = ⟨∇h, v⟩.

    The q_j are k ≤ b − 1 orthonormal directions that span the estimates of the guides, which are other strategies, and
    the memory h of the estimates before, in this order; what has no direction of its own is left out. The b − k
    directions v are random. E[p pᵀ] = I − Σ_j q_j q_jᵀ, so that ĝ is unbiased whatever the q_j are, given that none of
    them depends on the v: guides draw directions of their own, and the memory is of the past. With P = Σ_j q_j q_jᵀ and
    w = (1 − P) ∇h, E‖ĝ − ∇h‖² = e ‖w‖², with e the :meth:`~lightning_bilevel.directions.DirectionSampler.error` of
    b − k directions in N − k dimensions, up to k/N of it.

    After the estimate the memory becomes h = P ĝ + α (1 − P) ĝ, where P ĝ = P ∇h. α = 1/(1 + e) is the step that
    minimises E‖∇h − h‖². What the memory knew is measured anew, so that h has today's length and sign.
    For a gradient that stays, 1 − cos²(∇h, h) falls like ((N − b)/N)^t in t estimates; for one that drifts, with a
    correlation time of τ estimates, it comes to about 1/(1 + bτ/2N).

    A subclass says how slopes are found.

    >>> from lightning_bilevel import TruncatedReverse, ZerothOrder
    >>> list(ZerothOrder(8, guide=[TruncatedReverse(1), TruncatedReverse(5)], remember=True).members())
    ['guide 0', 'guide 1']
    """

    direction_parallel = True

    def __init__(
        self,
        num_directions: int,
        directions: DirectionSampler,
        chunk_size: int | None,
        guide: Guide,
        remember: bool,
    ) -> None:
        name = type(self).__name__
        self.num_directions = integer(f"{name}(num_directions=...)", num_directions)
        sampler: Any = directions
        if not isinstance(sampler, DirectionSampler):
            expected = "a sampler of directions such as `Rademacher()`"
            raise value_error(f"{name}(directions=...)", expected, sampler)
        self.directions, self.guide = directions, guide
        self.remember = flag(f"{name}(remember=...)", remember)
        self.chunk_size = checked_chunk_size(name, chunk_size)
        guides = [] if guide is None else [guide] if isinstance(guide, HypergradientStrategy) else guide
        if not isinstance(guides, Sequence) or not all(isinstance(each, HypergradientStrategy) for each in guides):
            raise value_error(
                f"{name}(guide=...)", "a strategy such as `TruncatedReverse(1)`, or a list of them", guide
            )
        known = {"a guide": "`guide=...`"} if guides else {}
        known |= {"a memory": "`remember=True`"} if remember else {}
        if known and num_directions < 2:
            hint = f"{' and '.join(known.values())}: one direction is for that, and at least one is drawn."
            raise value_error(
                f"{name}(num_directions=...)", f"at least 2 with {' and '.join(known)}", num_directions, hint
            )
        # A stack would have one q, that of the mean, where a loop has one per episode.
        self.supports_stacking = not guides

    @abstractmethod
    def slopes(self, problem: BilevelProblem, start: InnerState, phi: Params, episode: Episode) -> Slopes:
        """Return what finds slopes of h at φ.

        Args:
            problem: the problem.
            start: the inner state that every run starts from.
            phi: outer parameters.
            episode: inner and outer batches.
        """

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the estimate by random directions; see :meth:`HypergradientStrategy.estimate`."""
        members = self.members()
        rng = RngState(tree.device(phi)) if members else None
        slopes = self.slopes(problem, carry.inner, phi, episode)
        span, kept = Span(phi, min(self.num_directions - 1, len(members) + self.remember)), dict[str, Params]()
        for name, guide in members.items():
            # Every process needs the same q, so the guide's own directions are not sharded. They are none of ours.
            own = Call(call.key.fold_in(name), step=call.step, together=call.common.fold_in(name))
            if rng is not None:
                rng.restore()  # a guide sees the dropout masks of the run at φ
            guess = guide.estimate(problem, carry.of(name), phi, episode, own)
            kept |= kept_of(name, guess)
            length = span.add(name, _without(guess.grads, slopes.explicit)).item()
            if not 0 < length < torch.inf:
                self._say_that_it_has_no_direction(guide, length, problem)
        if self.remember:
            kept[MEMORY] = _on(phi, carry.strategy.get(MEMORY, {}))
            span.add(MEMORY, kept[MEMORY])
        grads = projected_mean(slopes, self.directions, self.num_directions, phi, call, span.stacked())
        result = slopes.result(grads)._replace(kept=kept, known=span.named(), explicit=slopes.explicit)
        # A part of the directions changes no memory: it has to stay the same on all processes.
        return self.averaged(result) if call.shard[1] == 1 else result

    def small(self, outer_size: int) -> HypergradientStrategy:
        """Return this strategy with two directions."""
        few = copy.copy(self)
        few.num_directions = min(self.num_directions, 2)
        return few

    def members(self) -> Mapping[str, HypergradientStrategy]:
        """Return the guides."""
        if self.guide is None or isinstance(self.guide, HypergradientStrategy):
            return {} if self.guide is None else {"guide": self.guide}
        return {f"guide {number}": guide for number, guide in enumerate(self.guide)}

    def averaged(self, result: Hypergradient) -> Hypergradient:
        """Return the estimate with the memory that it leaves: of zeros where there is something infinite in it."""
        if not self.remember:
            return result
        drawn = wide(_without(result.grads, result.explicit))
        alpha = self._step(result)
        memory = tree.scale(drawn, alpha)
        for q, slope in zip(result.known.values(), _coordinates(drawn, result.known), strict=True):
            memory = tree.add(memory, wide(q), alpha=(1 - alpha) * slope)
        if not torch.isfinite(tree.norm(memory)):  # zeros, so that all processes carry the same names
            memory = tree.zeros_like(memory)
        return result._replace(kept={**result.kept, MEMORY: memory})

    def explained(self, result: Hypergradient, cosine: float) -> dict[str, torch.Tensor]:
        """Return what of ∇h the guides and the memory know; see :meth:`HypergradientStrategy.explained`."""
        drawn = wide(_without(result.grads, result.explicit))
        squares = {name: tree.dot(wide(q), drawn).square() for name, q in result.known.items()}
        all_drawn = tree.norm(drawn).square()
        known = sum(squares.values(), torch.zeros_like(all_drawn))
        whole = known + self._step(result) * (all_drawn - known).clamp_min(0)  # α E‖(1 − P) ĝ‖² = ‖(1 − P) ∇h‖²
        whole, all_drawn = (each.clamp_min(torch.finfo(each.dtype).tiny) for each in (whole, all_drawn))
        share = (known / whole).item()
        error = (1 / cosine**2 - 1) / (1 - share) if share < 1 else torch.inf
        fewest = len(squares) + _fewest(self.directions, max(tree.numel(drawn) - len(squares), 1), error)
        return {
            **{f"explained_by_{name.replace(' ', '_')}": square / whole for name, square in squares.items()},
            "expected_cosine": (whole / all_drawn).sqrt(),
            "directions_needed": whole.new_tensor(float(fewest)),
        }

    def _step(self, result: Hypergradient) -> float:
        """Return α."""
        k, size = len(result.known), tree.numel(result.grads)
        count = self.num_directions - k
        return 1 / (1 + self.directions.of(count).error(max(size - k, 1), count))

    def _say_that_it_has_no_direction(
        self, guide: HypergradientStrategy, length: float, problem: BilevelProblem
    ) -> None:
        """Warn, once for a kind of guide."""
        said = problem.findings.setdefault(_NO_DIRECTION, set())
        if type(guide) not in said:
            said.add(type(guide))
            rank_zero_warn(
                f"The guide `{type(guide).__name__}` gave an estimate of norm {length}; "
                f"`{type(self).__name__}` goes on without it where that happens."
            )


def _without(grads: Params, explicit: Params) -> Params:
    return tree.sub(grads, explicit) if explicit else grads


def _on(phi: Params, memory: Params) -> Params:
    """Return a memory for these outer parameters: of those that it does not know, or in other shapes, zeros."""
    known = {name: value for name, value in memory.items() if name in phi and value.shape == phi[name].shape}
    return {name: known.get(name, torch.zeros_like(value)) for name, value in phi.items()}


def _coordinates(vector: Params, directions: Mapping[str, Params]) -> list[float]:
    """Return c with Σ_j c_j q_j the projection of a vector on the span of directions.

    They are orthonormal, but for those of several episodes, which are means.
    """
    rows = [wide(q) for q in directions.values()]
    if not rows:
        return []
    slopes = torch.stack([tree.dot(q, vector) for q in rows]).cpu().double()
    gram = torch.stack([torch.stack([tree.dot(q, other) for other in rows]) for q in rows]).cpu().double()
    found: list[float] = (torch.linalg.pinv(gram, hermitian=True) @ slopes).tolist()
    return found


def _fewest(directions: DirectionSampler, size: int, error: float) -> int:
    """Return the fewest directions whose mean has an error of at most ``error``; it falls with their number."""
    low, high = 0, 1
    while directions.of(high).error(size, high) > error and high < 2**60:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if directions.of(middle).error(size, middle) > error else (low, middle)
    return high


_NO_DIRECTION = "guides of which an estimate gave no direction"
"""Key of :attr:`BilevelProblem.findings`."""
