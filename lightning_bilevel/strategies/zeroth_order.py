"""Hypergradient from finite differences of h along random directions."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.directions import DirectionSampler, Gaussian
from lightning_bilevel.errors import integer, number, one_of
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.chunks import checked_chunk_size
from lightning_bilevel.strategies.perturbation import PerturbedRuns
from lightning_bilevel.strategies.rounding import CoarsestDtype, coarser, warn_of_rounding
from lightning_bilevel.tree import Params

Scheme = Literal["forward", "central"]


class ZerothOrder(HypergradientStrategy):
    r"""ĝ = (1/b) Σ_i [h(φ + μ v_i) − h(φ)] / μ · v_i, or central: [h(φ + μ v_i) − h(φ − μ v_i)] / 2μ · v_i.

    Biased by O(μ), central by O(μ²); its variance is that of :class:`ForwardGradient`. Nothing is
    differentiated, so it serves black-box solvers (``differentiable_solve = False``), losses without a second
    derivative, and inner levels of any kind. Also known as (FG)²U-ZO, HOZOG, ES-MAML, randomized smoothing.

    Memory: one inner run (times ``chunk_size``). Cost: b + 1 inner runs, central 2b + 1.

    Not where the inner steps can be differentiated: :class:`ForwardGradient` has no bias at a similar cost.
    Choose μ well above the rounding of h: a warning tells when μ² < ε h, with ε that of the least precise dtype in
    which anything is computed (bfloat16's under ``bf16-mixed``).

    Source: (FG)²U, arXiv 2406.14095, eq. 16 and 40; Nesterov and Spokoiny, 2017.

    Args:
        num_directions: b, the number of directions.
        mu: μ, in the units of φ.
        scheme: ``"forward"`` or ``"central"``.
        directions: the sampler.
        chunk_size: perturbed runs that are vectorized together; ``None`` chooses by device and kind of net.

    Raises:
        ValueError: a bad argument.

    >>> ZerothOrder(num_directions=4, mu=1e-2, scheme="central").scheme
    'central'
    """

    exact = False
    unbiased = False
    requires = "solve"
    second_order = False
    memory = "O(M · chunk)"
    cost = "b + 1 inner runs"
    direction_parallel = True

    def __init__(
        self,
        num_directions: int = 1,
        mu: float = 1e-3,
        scheme: Scheme = "forward",
        directions: DirectionSampler | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.num_directions = integer("ZerothOrder(num_directions=...)", num_directions)
        self.mu = number("ZerothOrder(mu=...)", mu, above=0)
        self.scheme = one_of("ZerothOrder(scheme=...)", Scheme, scheme)
        self.directions = directions if directions is not None else Gaussian()
        self.chunk_size = checked_chunk_size("ZerothOrder", chunk_size)
        self._looked = False

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the finite-difference estimate; see :meth:`HypergradientStrategy.estimate`."""
        with CoarsestDtype() if not self._looked else nullcontext() as seen:
            runs = PerturbedRuns(problem, memory, phi, episode, self.chunk_size)
            state = runs.base.state
            value = problem.outer_loss(state.params, phi, episode.outer, state.buffers).detach()
        if seen is not None:
            self._look_at_rounding(value, seen.dtype)
        total = tree.zeros_like(phi)
        for first, last in runs.chunks(*call.bounds(self.num_directions)):
            v = self.directions.draw(call.key, first, last, phi)
            ahead = runs.values(v, self.mu)
            if self.scheme == "central":
                slopes = (ahead - runs.values(v, -self.mu)) / (2 * self.mu)
            else:
                slopes = (ahead - value) / self.mu
            total = tree.add(total, tree.combine(slopes, v), alpha=call.shard[1] / self.num_directions)
        if runs.looped:
            self.chunk_size = 1  # one look is enough
        return Hypergradient(value, total, state, runs.base.metrics)

    def _look_at_rounding(self, value: Tensor, computed: torch.dtype | None) -> None:
        self._looked = True  # one look: each would wait for the device
        dtype = value.dtype if computed is None else coarser(value.dtype, computed)
        rounding = torch.finfo(dtype).eps * abs(value.item())
        if self.mu**2 < rounding:
            reason = f"differences of an outer loss of {value.item():.3g} are mostly rounding"
            warn_of_rounding("ZerothOrder", self.mu, dtype, reason, f"about {math.sqrt(rounding):.1g}")
