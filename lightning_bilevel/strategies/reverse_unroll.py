"""Exact hypergradient by reverse-mode differentiation through the inner run."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Literal

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import tied_to
from lightning_bilevel.calculus.outer import outer_graph, outer_value_and_grads
from lightning_bilevel.calculus.runs import last_loss, run_checkpointed, vector_jacobian
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import value_error
from lightning_bilevel.problem import Batch, BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.tree import Params


class ReverseUnroll(HypergradientStrategy):
    r"""∇h = d Z_T + c by the recursion c_{t-1} = c_t + d_t B_t, d_{t-1} = d_t A_t from t = T down to 1.

    With A_t = ∂Ω_t/∂θ, B_t = ∂Ω_t/∂φ, d_T = ∂f/∂θ_T, c_T = ∂f/∂φ.

    Exact, for every inner optimizer, shared parameters and learned hyperparameters, and the cheapest exact
    strategy. Also known as RGU, RMD, BP and ITD.

    Memory: the graphs of T inner steps; with ``checkpoint=k``, T/k inner states and the graphs of k steps. Cost: T
    steps and T second-order backward steps, about 2–3 plain inner runs; with ``checkpoint`` T - k steps more.

    Not for long inner runs without ``checkpoint``, nor for black-box solvers.

    Source: (FG)²U, arXiv 2406.14095, eq. 5–6.

    Args:
        checkpoint: ``None`` keeps the whole graph; a positive integer k keeps the inner state every k steps and
            recomputes; ``"sqrt"`` keeps ⌈√(3T)⌉ of them, where memory is about least: the graph of a step holds
            several times what the state does.

    Raises:
        ValueError: ``checkpoint`` is none of these.

    >>> ReverseUnroll(checkpoint="sqrt").checkpoint
    'sqrt'
    """

    exact = True
    unbiased = True
    differentiates = frozenset({"run"})
    memory = "O(T) activations, or O(√T)"
    cost = "T steps + T second-order backward steps"
    weighs_steps = True

    def __init__(self, checkpoint: int | Literal["sqrt"] | None = None) -> None:
        whole = isinstance(checkpoint, int) and not isinstance(checkpoint, bool) and checkpoint >= 1
        if checkpoint is not None and checkpoint != "sqrt" and not whole:
            raise value_error("ReverseUnroll(checkpoint=...)", "None, a positive integer or 'sqrt'", checkpoint)
        self.checkpoint = checkpoint

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return ∇h(φ); see :meth:`HypergradientStrategy.estimate`."""
        step, segments = inner_step(problem), _segments(problem.batches(episode), self.checkpoint)
        outer = tree.leaves(phi)
        start = problem.start(carry.inner, outer)
        moving = {name: tensor for name, tensor in start.flat().items() if tensor.requires_grad}
        tied = tied_to(outer, start.params)
        whole = step.whole(start.detach(), phi, segments[0], episode.outer, tied) if len(segments) == 1 else None
        if whole is not None:
            rest = {name: tensor for name, tensor in moving.items() if name in whole.d}
            grads = tree.add(whole.c, vector_jacobian(rest, outer, whole.d)) if rest else whole.c
            metrics = last_loss(problem, whole.losses)
            return Hypergradient(whole.value, grads, whole.state, metrics, observed=whole.observed)
        if len(segments) == 1:  # one graph of all, and one pass over it
            end, losses = step.graph(start, outer, segments[0])
            metrics = last_loss(problem, losses)
            value, observed = outer_graph(problem, end, outer, episode)
            grads = tree.grad(value, outer)
            return Hypergradient(value.detach(), grads, end.detach(), metrics, observed=observed)
        final, losses, pull = run_checkpointed(step, start.detach(), phi, segments)
        metrics = last_loss(problem, losses)
        value, d, c, observed = outer_value_and_grads(problem, final, phi, episode)
        d_0, through = pull(d, moving)
        grads = tree.add(tree.add(c, through), vector_jacobian(moving, outer, d_0))
        return Hypergradient(value, grads, final, metrics, observed=observed)


def _segments(batches: list[Batch], checkpoint: int | Literal["sqrt"] | None) -> list[list[Batch]]:
    """Cut a run where its states are kept, shorter segments last: while they run backward, most states are held.

    >>> [len(segment) for segment in _segments([None] * 20, "sqrt")]
    [3, 3, 3, 3, 2, 2, 2, 2]
    """
    if checkpoint is None:
        return [batches]
    if checkpoint == "sqrt":
        count = min(len(batches), math.ceil(math.sqrt(3 * len(batches))))
        least, longer = divmod(len(batches), count)
        ends = list(accumulate([least + 1] * longer + [least] * (count - longer)))
    else:
        ends = [*range(checkpoint, len(batches), checkpoint), len(batches)]
    return [batches[first:end] for first, end in pairwise([0, *ends])]
