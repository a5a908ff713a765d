"""Hypergradient of a whole run from the few inner steps of each outer one, by perturbations that last."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import outer_value
from lightning_bilevel.directions import Gaussian
from lightning_bilevel.errors import MisconfigurationError, combination_error, integer, number
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.perturbation import PerturbedRuns, coarsest
from lightning_bilevel.strategies.rounding import first_look, look_at_differences
from lightning_bilevel.strategies.slopes import balanced_size, checked_chunk_size
from lightning_bilevel.tree import Params


class PES(HypergradientStrategy):
    r"""ĝ = 1/(2bμ) Σ_i [h(φ + μ v_i; s_i⁺) − h(φ − μ v_i; s_i⁻)] V_i,  V_i = Σ v_i over all steps, v_i ~ N(0, I).

    Persistent evolution strategies: b pairs of perturbed runs go on from outer step to outer step as θ does, each from
    its own state s_i⁺ or s_i⁻, with a fresh perturbation at every step; V_i is the sum of those that have shaped its
    state. So nothing is cut off at the T steps of one outer step, where :class:`ZerothOrder` with a warm start sees
    these only: for many outer parameters and long trainings, what ``ForwardUnroll(warm_start=True)`` is for few.

    Where φ stays, unbiased for the derivative of the whole run's h since its start, smoothed over N(0, μ²I) drawn anew
    at every outer step, so biased by O(μ²) for ∇h itself; where φ moves, what lasts is of the φ of then. The variance
    grows in proportion to the outer steps since the start, from that of ``ZerothOrder(scheme="central")`` at the first.
    Nothing is differentiated.

    A run starts with a fit, and with every estimate in which ``inner_start`` is ``"reset"`` or ``"reinit"``: then all
    pairs start where θ does, and V is zero. For inner problems of 100 outer steps, in the module::

        def on_train_batch_start(self, batch, batch_idx):
            self.inner_start = "reinit" if batch_idx % 100 == 0 else "warm"

    θ that is set by hand goes unnoticed. The run at φ itself is taken besides: it gives the value, and θ.

    Memory: 2b inner states, with the optimizer's, and b N, carried, saved with a checkpoint and averaged over
    processes, which draw alike. Cost: 2b + 1 inner runs. Not where the inner steps can be differentiated and T of them
    are all that counts: see :class:`ForwardGradient`. μ as in :class:`ZerothOrder`; its effects add up over a run.

    Source: Vicol, Metz and Sohl-Dickstein, ICML 2021, arXiv 2112.13835, in antithetic pairs.

    Args:
        num_directions: b, the number of pairs.
        mu: μ, σ in the paper, in the units of φ.
        chunk_size: perturbed runs that are vectorized together; ``None`` chooses by device and kind of net.

    Raises:
        ValueError: a bad argument.

    >>> PES(num_directions=8, mu=1e-2).differentiates
    frozenset()
    """

    exact = False
    unbiased = False
    differentiates = frozenset()
    memory = "O(b · (M + N))"
    cost = "2b + 1 inner runs"
    weighs_steps = True
    supports_stacking = False

    def __init__(self, num_directions: int = 1, mu: float = 1e-2, chunk_size: int | None = None) -> None:
        self.num_directions = integer("PES(num_directions=...)", num_directions)
        self.mu = number("PES(mu=...)", mu, above=0)
        self.chunk_size = checked_chunk_size("PES", chunk_size)

    def small(self, outer_size: int) -> HypergradientStrategy:
        """Return this strategy with one pair."""
        one = copy.copy(self)
        one.num_directions = 1
        return one

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what no perturbation lasts in."""
        if not problem.shared:
            return []
        because = "these start anew from φ at every outer step, so that no perturbation lasts"
        return [combination_error("`PES` with parameters shared by both levels", because, "Use `ZerothOrder`")]

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return ĝ; see :meth:`HypergradientStrategy.estimate`.

        Carried: the states of all runs, those of +μ first, and V.
        """
        b, look = self.num_directions, first_look(problem, "PES", self.mu)
        with coarsest(problem, carry.inner, phi, episode) if look else nullcontext() as seen:
            runs = PerturbedRuns(problem, carry.inner, phi, episode, self.chunk_size)
            value, observed = outer_value(problem, runs.base.state, phi, episode)
        if seen is not None:
            look_at_differences("PES", self.mu, value, seen.dtype)
        states, total = self._begun(problem, carry, phi)
        v = Gaussian().draw(call.common, 0, b, phi)
        both = {name: torch.cat([rows, -rows]) for name, rows in v.items()}
        values, ends = [], []
        size = balanced_size(2 * b, runs.chunk_size)
        for first in range(0, 2 * b, size):
            rows = partial(_rows, first, first + size)
            value_of_each, end = runs.ends(tree.map(rows, both), self.mu, states.map(rows))
            values.append(value_of_each)
            ends.append(end)
        h, total = torch.cat(values), tree.add(total, v)
        grads = tree.combine((h[:b] - h[b:]) / (2 * b * self.mu), total)
        kept = {"sum": total, **_kept(InnerState.cat(ends), problem.traits.warm)}
        return Hypergradient(value, grads, runs.base.state, runs.base.metrics, kept, observed)

    def _begun(self, problem: BilevelProblem, carry: Carry, phi: Params) -> tuple[InnerState, Params]:
        """Return the states that the runs go on from, stacked, and V before this step."""
        b, kept = self.num_directions, carry.strategy
        if not problem.traits.warm or not kept:
            return carry.inner.map(partial(_copies, 2 * b)), tree.map(partial(_copies, b), tree.zeros_like(phi))
        pairs = tree.count(kept["sum"])
        if pairs != b:
            raise combination_error(
                f"`PES(num_directions={b})`",
                f"what goes on is of {pairs} pairs of runs",
                f"Use `num_directions={pairs}`, or begin a new fit",
            )
        buffers = {name: _copies(2 * b, value) for name, value in carry.inner.buffers.items()}
        buffers |= {name: rows.to(buffers[name].device) for name, rows in kept["buffers"].items() if name in buffers}
        opt_state = {slot.removeprefix(_SLOT): rows for slot, rows in kept.items() if slot.startswith(_SLOT)}
        return InnerState(kept["theta"], buffers, opt_state, carry.inner.steps), kept["sum"]


_SLOT = "slot "


def _rows(first: int, last: int, stacked: Tensor) -> Tensor:
    return stacked[first:last]


def _copies(count: int, value: Tensor) -> Tensor:
    return value.expand(count, *value.shape)


def _kept(states: InnerState, warm: bool) -> dict[str, Params]:
    """Return states as trees; the optimizer of a run that was not warm does not go on, as that of θ does not."""
    slots = {f"{_SLOT}{slot}": rows for slot, rows in states.opt_state.items()} if warm else {}
    return {"theta": states.params, "buffers": states.buffers, **slots}
