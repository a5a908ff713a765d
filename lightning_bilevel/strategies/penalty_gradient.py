"""The gradient of a penalty function: two inner runs, of which one also goes down the outer loss."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner import inner_value_and_grads
from lightning_bilevel.calculus.outer import outer_value, outer_value_and_grads
from lightning_bilevel.calculus.runs import run
from lightning_bilevel.errors import MisconfigurationError, NonfiniteError, number, one_of
from lightning_bilevel.problem import Batch, BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.rounding import coarser, coarsest_in, first_look, rounding_error
from lightning_bilevel.strategies.stationarity import unseen_by_the_minimum
from lightning_bilevel.strategies.value_gap import checked_outer_loss
from lightning_bilevel.tree import Params

Scheme = Literal["forward", "central"]

_ENOUGH = 10.0
"""A warning is due where a difference is less than so many times its rounding: the estimate is then off by a tenth."""


class PenaltyGradient(HypergradientStrategy):
    r"""ĝ = ∂_φ f(y) + λ (∂_φ g(y) − ∂_φ g(z)) with z = argmin_θ g and y = argmin_θ g + f/λ.

    z and y are the ends of two inner runs from one start, one on g and one on g + f/λ: equal numbers of steps, the
    same batches, masks, optimizer and state of it. ``scheme="central"`` takes y₊ on g + f/λ and y₋ on g − f/λ, and

        ĝ = ½ (∂_φ f(y₊) + ∂_φ f(y₋)) + λ/2 (∂_φ g(y₊) − ∂_φ g(y₋))

    With ℓ_ν(φ) = min_θ g + νf, ∇h is the derivative of ∂_φ ℓ_ν by ν at ν = 0, and these are its differences. ∂_φ g is
    the mean over the batches of the run. g is the inner loss *with* the weight decay of the inner optimizer, and with
    the other sign under ``maximize`` (see :meth:`BilevelProblem.stationary`), so that a learned decay is seen.

    Only gradients of both losses are taken: no second derivative, and no graph of the run. So fused attention, compiled
    and quantized parts, and functions that are ``once_differentiable`` will do; any inner optimizer, and projections.

    Biased: by O(1/λ), O(1/λ²) if central, where the runs end at the minima. Before that, for gradient descent and
    λ → ∞, ĝ = c − ηΣ_{k<T} d_{T−1−k} (I − ηH)ᵏ ∂²g/∂θ∂φ: from the minimum it equals ``Neumann(T, step_size=η)``. The
    central one needs a minimum of g − f/λ. Rounding grows with λ: it is about λ ε ‖∂_φ g‖ / ‖ĝ‖ of ĝ. So float32 is
    good for λ up to 10³ or 10⁴, and bfloat16 for next to none; a warning tells.

    Memory: O(M + N), and the activations of both losses at once. Cost: two inner runs (three), one of them (two) with a
    gradient of f in every step, and 3 (4) gradients by φ, where one of g is one for every batch. The value is f(z), as
    everywhere; ĝ is not quite its gradient, which a line search of the outer optimizer (LBFGS) would notice.

    Needs a φ that the minimum depends on: parameters shared by both levels need ``proximal > 0`` (iMAML), a learned
    learning rate is refused, and a start that depends on φ has no part in it. Decoupled decay (``AdamW``) is in no
    loss: ĝ is that of g, to whose minimum such runs come near where their ``eps`` is small. An inner rate that suits g
    suits g + f/λ where λ is above the ratio of their curvatures.

    Source: F2SA, Kwon et al., ICML 2023, arXiv 2301.10945, Algorithm 1 and Lemma 3.1; V-PBGD, Shen and Chen, ICML 2023,
    arXiv 2302.05185; ScaleBiO, Pan et al., arXiv 2406.19976; central: Chen et al., arXiv 2509.02937. They carry y and z
    from step to step, and take fewer steps with each.

    Args:
        penalty: λ, the weight of g against f.
        scheme: ``"forward"`` or ``"central"``.

    Raises:
        ValueError: a bad argument.

    >>> PenaltyGradient(penalty=1000.0).differentiates
    frozenset()
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    needs_steps = True
    memory = "O(M + N)"
    cost = "2 inner runs + T outer gradients + 3 gradients by φ"

    def __init__(self, penalty: float = 100.0, scheme: Scheme = "forward") -> None:
        self.penalty = number("PenaltyGradient(penalty=...)", penalty, above=0)
        self.scheme: Scheme = one_of("PenaltyGradient(scheme=...)", Scheme, scheme)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the difference of the two ends; see :meth:`HypergradientStrategy.estimate`."""
        batches, start = problem.batches(episode), problem.start(carry.inner, phi)
        device = tree.device(phi)
        masks = RngState(device)
        z = run(problem, start, phi, batches)
        value, observed = outer_value(problem, z.state, phi, episode)
        checked_outer_loss(value)
        with RngState(device).fork():  # what follows repeats the draws of that run
            y = self._end(problem, start, phi, episode, 1.0, masks)
            c, other, distance = y.c, _End(z.state, {}, {}), self.penalty
            if self.scheme == "central":
                other = self._end(problem, start, phi, episode, -1.0, masks)
                c, distance = tree.scale(tree.add(y.c, other.c), 0.5), self.penalty / 2
            of_y, of_other = (_by_phi(problem, end.state, phi, batches, masks) for end in (y, other))
            difference = tree.sub(of_y, of_other)
            if first_look(problem, "PenaltyGradient", self.penalty) and bool(tree.norm(y.d) > 0):
                computed = _dtype(problem, y.state, phi, batches[0])
                change = tree.norm(difference) / tree.norm(of_other)
                self._look_at_rounding(y.state, other.state, start, change, computed)
        return Hypergradient(value, tree.add(c, difference, alpha=distance), z.state, z.metrics, observed=observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the minimum does not depend on in ``problem``."""
        return unseen_by_the_minimum(problem, "PenaltyGradient", problem.traits.learned())

    def _end(
        self, problem: BilevelProblem, start: InnerState, phi: Params, episode: Episode, sign: float, masks: RngState
    ) -> _End:
        """Return the end of the run on g ± f/λ, with the gradients of f there."""
        masks.restore()
        penalized = with_outer_loss(problem, episode, sign / self.penalty)
        try:
            state, _ = run(penalized, start, phi, problem.batches(episode))
        except NonfiniteError as error:
            raise error.with_note("(In the run that also goes down the outer loss: raise `penalty`.)") from error
        _, d, c, _ = outer_value_and_grads(problem, state, phi, episode)
        return _End(state, d, c)

    def _look_at_rounding(
        self, y: InnerState, other: InnerState, start: InnerState, change: Tensor, computed: torch.dtype
    ) -> None:
        """Compare how far apart the two ends are, and the two gradients by φ, with what rounding alone does.

        θ is rounded where it is stored; what the steps add to it, and ∂_φ g, as everything is that is computed.
        """
        theta = y.params
        dtype = reduce(coarser, (value.dtype for value in theta.values()))
        of_gradient = coarser(dtype, computed)
        rounding = torch.hypot(
            rounding_error(dtype) * tree.norm(theta),
            rounding_error(of_gradient) * tree.norm(tree.sub(theta, start.params)),
        )
        moves = (tree.norm(tree.sub(theta, other.params)) / rounding).item()
        changes = (change / rounding_error(of_gradient)).item()  # nan where g has no gradient by φ
        least = min(moves, changes) if changes == changes else moves
        if least < _ENOUGH:
            finer = "" if of_gradient == torch.float64 else ", or use a finer dtype"
            warnings.warn(
                f"`PenaltyGradient(penalty={self.penalty})` is large for {of_gradient}: what it takes differences of "
                f"differs by {least:.2g} times its rounding. Lower `penalty`{finer}.",
                stacklevel=3,
            )


class _End(NamedTuple):
    """The end of a run, and the gradients d = ∂f/∂θ and c = ∂f/∂φ there."""

    state: InnerState
    d: Params
    c: Params


def with_outer_loss(problem: BilevelProblem, episode: Episode, weight: float | Tensor) -> BilevelProblem:
    """Return the problem whose inner steps minimize what they did, and ``weight`` times the outer loss.

    A weight that is another one at every outer step is a tensor: graphs of the steps hold for all of them.

    What the outer loss draws leaves no trace: masks of the inner loss are those of a run without it.

    >>> from lightning_bilevel.testing import Quadratic
    >>> module = Quadratic()
    >>> (problem, phi, carry), episode = module.plain(), module.episode()
    >>> at = carry.inner.params, phi
    >>> f = problem.outer_loss(*at, episode.outer, {})
    >>> both = problem, with_outer_loss(problem, episode, 0.1)
    >>> plain, mixed = (each.inner_loss(*at, episode.inner[0], {})[0] for each in both)
    >>> torch.allclose(mixed, plain + 0.1 * f)
    True
    """
    weight = -weight if problem.maximize else weight

    def inner_loss(theta: Params, outer: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Params]:
        loss, after = problem.inner_loss(theta, outer, batch, buffers)
        with RngState(loss.device).fork():
            of_outer = weight.to(loss) if isinstance(weight, Tensor) else weight
            return loss + of_outer * problem.outer_loss(theta, outer, episode.outer, after), after

    return replace(problem, inner_loss=inner_loss)


def _by_phi(problem: BilevelProblem, state: InnerState, phi: Params, batches: list[Batch], masks: RngState) -> Params:
    masks.restore()
    return inner_value_and_grads(problem.stationary(), state, phi, batches, by_theta=False).c


def _dtype(problem: BilevelProblem, state: InnerState, phi: Params, batch: Batch) -> torch.dtype:
    """Return the coarsest dtype on the way to the inner loss."""
    with torch.enable_grad():
        loss, _ = problem.inner_loss(tree.leaves(state.params), tree.leaves(phi), batch, state.buffers)
    return coarsest_in(loss)
