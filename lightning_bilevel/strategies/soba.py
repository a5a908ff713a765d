"""One step of the inner parameters, of the linear system and of the hypergradient, all at the same old point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import Condition
from lightning_bilevel.calculus.outer import outer_value, outer_value_and_grads
from lightning_bilevel.calculus.runs import last_loss
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.data.numbered import places_of
from lightning_bilevel.errors import MisconfigurationError, combination_error, integer, number, one_of, value_error
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.gradient_table import GradientTable
from lightning_bilevel.strategies.stationarity import distance
from lightning_bilevel.strategies.value_gap import checked_outer_loss, refusals_of_joint_steps
from lightning_bilevel.tree import Params

T = TypeVar("T")
Momentum = Literal["none", "average", "corrected", "recursive", "table"]


class SOBA(HypergradientStrategy):
    r"""Three directions at one point (θ, v, φ), and a step along each: the outer optimizer takes that of φ.

    With samples ξ₁, ξ₂, ξ₃ of the inner level and the outer batch::

        D_θ = ∂_θ g(θ, φ; ξ₁)                       θ ← θ − τ D_θ
        D_v = ∂²_θ g(θ, φ; ξ₂) v − ∂_θ f(θ, φ)      v ← v − β D_v
        D_φ = ∂_φ f(θ, φ) − ∂_φ∂_θ g(θ, φ; ξ₃) v    ĝ = D_φ

    ``momentum="average"`` returns r ← (1 − η) r + η D_φ (MA-SOBA). ``"corrected"`` replaces all three by
    D ← D(now; ξ) + (1 − η)(D_last − D(before; ξ)), whose noise falls where points change little from step to step
    (STORM; SUSTAIN and MRBO do this for θ and φ). ``"recursive"`` does it with η = 0, but at every ``period``-th step
    D = D(now; ξ) is taken as it is (SARAH; SRBA): let the batches of these steps be all there is, and no noise is left
    where points rest; ``docs/methods.md`` has loaders that do. ``"table"`` keeps of every mini-batch the five gradients
    that the directions are made of, and takes each as now − its row + the mean of the rows (SAGA; SABA), see
    :class:`~lightning_bilevel.strategies.gradient_table.GradientTable`: no noise is left where points rest, at constant
    steps and without a full batch. It needs to know which batch is which: see :func:`~lightning_bilevel.numbered`.
    g is the inner loss with the weight decay of the inner optimizer, and with the other sign where that ascends (see
    :meth:`BilevelProblem.stationary`); its steps are not used.

    Biased at every step; tracks ∇h as θ and v converge: ``inner_residual`` is logged, see :class:`FSLA`, which takes
    the new θ and the new v in its hypergradient. Memory: O(M + N); with a table of n inner and m outer batches
    n (2M + N) + m (M + N) more, which a checkpoint holds and processes average. Cost: 1 inner gradient with a graph for
    each of the three samples, one Hessian and one mixed product, one outer gradient; twice that where momentum looks
    back. The value is f at the new θ. v diverges unless β < 2/λ_max of the inner Hessian.

    ξ₁, ξ₂, ξ₃ are the first three inner batches of the episode (cycled). Needs ``inner_start="warm"``,
    ``inner_steps=1``, no shared parameters, one episode a batch.

    Source: Dagréou et al., NeurIPS 2022, arXiv 2201.13409, Algorithm 1, eq. 5–7, and SABA; MA-SOBA: Chen et
    al., 2023, arXiv 2306.12067; SUSTAIN: Khanduri et al., NeurIPS 2021, arXiv 2102.07367; SRBA: Dagréou et al., AISTATS
    2024, arXiv 2302.08766, Algorithm 1.

    Args:
        tau: τ, the step of θ.
        beta: β, the step of v.
        eta: η in (0, 1], weight of the new sample.
        momentum: ``"none"``, ``"average"``, ``"corrected"``, ``"recursive"`` or ``"table"``.
        period: with ``"recursive"``, the steps from one full batch to the next.

    Raises:
        ValueError: a bad argument.

    >>> SOBA(tau=0.1, beta=0.1, eta=0.5, momentum="average").eta
    0.5
    """

    exact = False
    unbiased = False
    differentiates = frozenset({"inner_gradient"})
    needs_steps = True
    memory = "O(M + N)"
    cost = "1 step + 1 Hessian product + 1 mixed product"
    supports_stacking = False

    def __init__(
        self,
        tau: float = 0.01,
        beta: float = 0.01,
        eta: float = 0.9,
        momentum: Momentum = "none",
        period: int | None = None,
    ) -> None:
        self.tau = number("SOBA(tau=...)", tau, above=0)
        self.beta = number("SOBA(beta=...)", beta, above=0)
        self.eta = number("SOBA(eta=...)", eta, above=0, at_most=1)
        self.momentum: Momentum = one_of("SOBA(momentum=...)", Momentum, momentum)
        if (momentum == "recursive") != (period is not None):
            hint = "How often do the loaders give all there is? `SOBA(momentum='recursive', period=100)`."
            raise value_error("SOBA(period=...)", "a number of steps with `momentum='recursive'`, only", period, hint)
        self.period = None if period is None else integer("SOBA(period=...)", period, least=2)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return D_φ, and take both other steps; see :meth:`HypergradientStrategy.estimate`.

        Carried: v, and with momentum the directions and the point of the last step, or the table.

        Raises:
            MisconfigurationError: a table, and batches that are not numbered, or as many as there are rows.
        """
        last, start = carry.strategy, problem.start(carry.inner, phi)
        v = last.get("v", tree.zeros_like(start.params))
        masks = RngState(tree.device(phi))
        loss, after = _inner_loss(problem, start, phi, episode)
        masks.restore()
        at = _gradients(problem, start, phi, v, episode)
        table = GradientTable(last if self.momentum == "table" else {})
        used = now = _directions(_tabled(at, table, episode) if self.momentum == "table" else at)
        if self.momentum == "average" and last:
            used = now._replace(phi=tree.add(tree.scale(now.phi, self.eta), last["d phi"], alpha=1 - self.eta))
        if last and self._continues(start.steps):
            masks.restore()
            before = replace(start, params=last["theta"])
            past = _directions(_gradients(problem, before, last["phi"], last["last v"], episode))
            used = _Directions(
                self._corrected(now.theta, last["d theta"], past.theta),
                self._corrected(now.v, last["d v"], past.v),
                self._corrected(now.phi, last["d phi"], past.phi),
            )
        moved = tree.add(start.params, used.theta, alpha=-self.tau)
        state = InnerState(moved, after, start.opt_state, start.steps + 1)
        value, observed = outer_value(problem, state, phi, episode)
        metrics = {**loss, "inner_residual": distance(at.slope, v, at.d, start.params)}
        kept = {"v": tree.add(v, used.v, alpha=-self.beta)}
        if self.momentum in ("average", "corrected", "recursive"):
            kept["d phi"] = used.phi
        if self.momentum in ("corrected", "recursive"):
            kept |= {"d theta": used.theta, "d v": used.v, "theta": start.params, "phi": phi, "last v": v}
        # φ is stepped in place after this, and what is kept is averaged over processes, so all is copied.
        kept = {name: tree.map(torch.clone, values) for name, values in kept.items()}
        return Hypergradient(value, used.phi, state, metrics, {**table.kept, **kept}, observed)

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what the single loop cannot work with in ``problem``."""
        return refusals_of_joint_steps(problem, "SOBA", one_step=True)

    def _continues(self, steps: int) -> bool:
        """Return whether the directions of a step, the number of those before it given, go on from the last ones."""
        return self.momentum == "corrected" if self.period is None else steps % self.period > 0

    def _corrected(self, now: Params, last: Params, past: Params) -> Params:
        return tree.add(now, tree.sub(last, past), alpha=1.0 if self.period is not None else 1 - self.eta)


class _Gradients(NamedTuple):
    """∂_θ g, ∂²_θ g v, ∂_φ∂_θ g v, ∂_θ f and ∂_φ f at a point."""

    slope: Params
    product: Params
    mixed: Params
    d: Params
    c: Params


class _Directions(NamedTuple):
    """D_θ, D_v and D_φ at a point."""

    theta: Params
    v: Params
    phi: Params


def _gradients(problem: BilevelProblem, state: InnerState, phi: Params, v: Params, episode: Episode) -> _Gradients:
    conditions: dict[int, Condition] = {}
    for batch in episode.inner[:3]:
        if id(batch) not in conditions:
            conditions[id(batch)] = inner_step(problem.stationary()).stationarity(state, phi, batch)
    first, second, third = (conditions[id(batch)] for batch in _three(episode.inner))
    value, d, c, _ = outer_value_and_grads(problem, state, phi, episode)
    checked_outer_loss(value)
    return _Gradients(first.residual, second.transposed(v), third.mixed(v), d, c)


def _directions(at: _Gradients) -> _Directions:
    return _Directions(at.slope, tree.sub(at.product, at.d), tree.sub(at.c, at.mixed))


def _tabled(at: _Gradients, table: GradientTable, episode: Episode) -> _Gradients:
    """Return the gradients corrected by their rows."""
    inner, outer = places_of(episode)
    places = [*_three(inner), outer, outer]
    if None in places:
        raise combination_error(
            "`SOBA(momentum='table')` with batches that have no number",
            "its table has a row for each, of the inner and of the outer level",
            "Number them: `EpisodeLoader(inner=numbered(inner), outer=numbered(outer))`, with each list as it is or, "
            "to be shuffled, in a `DataLoader(..., batch_size=None, shuffle=True)`",
        )
    rows = zip(_Gradients._fields, at, filter(None, places), strict=True)
    return _Gradients(*(table.corrected(name, now, place) for name, now, place in rows))


def _three(values: Sequence[T]) -> list[T]:
    """Return what belongs to ξ₁, ξ₂ and ξ₃."""
    return [values[number % len(values)] for number in range(3)]


def _inner_loss(
    problem: BilevelProblem, state: InnerState, phi: Params, episode: Episode
) -> tuple[dict[str, torch.Tensor], Params]:
    """Return g as a metric, and the buffers that a step leaves behind."""
    with torch.no_grad():
        loss, after = problem.inner_loss(state.params, phi, episode.inner[0], state.buffers)
    return last_loss(problem, [loss]), after
