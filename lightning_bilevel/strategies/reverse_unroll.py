"""Exact hypergradient by reverse-mode differentiation through the inner run."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Literal

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.autodiff import outer_gradients
from lightning_bilevel.calculus.inner_loop import pull_back, record, run, vector_jacobian
from lightning_bilevel.errors import value_error
from lightning_bilevel.problem import Batch, BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, RngState
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
    requires = "solve"
    second_order = True
    memory = "O(T) activations, or O(√T)"
    cost = "T steps + T second-order backward steps"

    def __init__(self, checkpoint: int | Literal["sqrt"] | None = None) -> None:
        whole = isinstance(checkpoint, int) and not isinstance(checkpoint, bool) and checkpoint >= 1
        if checkpoint not in (None, "sqrt") and not whole:
            raise value_error("ReverseUnroll(checkpoint=...)", "None, a positive integer or 'sqrt'", checkpoint)
        self.checkpoint = checkpoint

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return ∇h(φ); see :meth:`HypergradientStrategy.estimate`."""
        if self.checkpoint is None or problem.solver is not None:
            return unrolled(problem, memory, phi, episode)
        outer, stretches = tree.leaves(phi), _stretches(problem.batches(episode), self.checkpoint)
        start = problem.start(memory, outer)
        (final, metrics), segments = record(problem, start.detach(), phi, stretches)
        value, d, c = outer_gradients(problem, final, phi, episode)
        with RngState(value.device).fork():
            through_steps, d_0 = pull_back(problem, segments, phi, _cotangent(final, d))
        through_start = vector_jacobian(start.flat(), outer, d_0)
        grads = tree.add(tree.add(c, through_steps), through_start)
        return Hypergradient(value, grads, final, metrics)


def unrolled(problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode) -> Hypergradient:
    """Return ∇h by one backward pass over the graph of the whole run."""
    outer = tree.leaves(phi)
    final, metrics = run(problem, problem.start(memory, outer), outer, problem.batches(episode), create_graph=True)
    value = problem.outer_loss(final.params, outer, episode.outer, final.buffers)
    return Hypergradient(value.detach(), tree.grad(value, outer), final.detach(), metrics)


def _cotangent(final: InnerState, d: Params) -> Params:
    """Return d with zeros for the optimizer's state; ``d`` is emptied, so that nothing holds it longer than needed."""
    return {name: d.pop(name) if name in d else torch.zeros_like(value) for name, value in final.flat().items()}


def _stretches(batches: list[Batch], checkpoint: int | Literal["sqrt"]) -> list[list[Batch]]:
    """Cut a run where its states are kept, shorter stretches last: while they run backward, most states are held.

    >>> [len(stretch) for stretch in _stretches([None] * 20, "sqrt")]
    [3, 3, 3, 3, 2, 2, 2, 2]
    """
    if checkpoint == "sqrt":
        count = max(1, math.ceil(math.sqrt(3 * len(batches))))
        least, longer = divmod(len(batches), count)
        ends = list(accumulate([least + 1] * longer + [least] * (count - longer)))
    else:
        ends = [*range(checkpoint, len(batches), checkpoint), len(batches)]
    return [batches[first:end] for first, end in pairwise([0, *ends])]
