"""Exact hypergradient by forward-mode differentiation along every outer coordinate."""

from __future__ import annotations

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.step import Mode
from lightning_bilevel.errors import one_of
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.slopes import checked_chunk_size
from lightning_bilevel.strategies.tangent_slopes import TangentSlopes
from lightning_bilevel.tree import Params


class ForwardUnroll(HypergradientStrategy):
    r"""∇h = d Z_T + c with Z_t = A_t Z_{t-1} + B_t, column by column: (∇h)_i = d Z_T e_i + c e_i.

    Exact, like :class:`ReverseUnroll`, with memory that does not grow with the number of inner steps: the
    choice for long runs and few outer parameters. Also known as FGU and FMD.

    Memory: M × ``chunk_size``. Cost: T steps and N tangents pushed through each; with N outer
    parameters in the thousands use :class:`ForwardGradient`.

    Source: (FG)²U, arXiv 2406.14095, eq. 4; Franceschi et al., ICML 2017.

    Args:
        chunk_size: columns pushed at once; the inner run is repeated per chunk. ``None`` picks the largest that
            fits a memory budget.
        mode: engine, see :mod:`lightning_bilevel.calculus.tangents`.

    Raises:
        ValueError: a bad ``chunk_size`` or ``mode``.

    >>> ForwardUnroll(chunk_size=8).exact
    True
    """

    exact = True
    unbiased = True
    differentiates = frozenset({"run"})
    memory = "O(M · chunk)"
    cost = "T steps + T · N tangents"
    weighs_steps = True

    def __init__(self, chunk_size: int | None = None, mode: Mode = "auto") -> None:
        self.chunk_size = checked_chunk_size("ForwardUnroll", chunk_size)
        self.mode = one_of("ForwardUnroll(mode=...)", Mode, mode)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return ∇h(φ); see :meth:`HypergradientStrategy.estimate`."""
        size = tree.numel(phi)
        slopes = TangentSlopes(problem, carry.inner, phi, episode, self.mode, self.chunk_size)
        flat = tree.flatten(phi)
        grad = torch.empty_like(flat)
        for first, last in slopes.chunks(0, size):
            rows = torch.zeros(last - first, size, dtype=flat.dtype, device=flat.device)
            rows[torch.arange(last - first), torch.arange(first, last)] = 1
            grad[first:last] = slopes.along(tree.unflatten(rows, phi)).to(grad.dtype)
        return slopes.result(tree.unflatten(grad, phi))
