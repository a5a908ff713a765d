"""Exact hypergradient by forward-mode differentiation along every outer coordinate."""

from __future__ import annotations

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.runs import pushed_run
from lightning_bilevel.calculus.step import Mode
from lightning_bilevel.directions import Rademacher
from lightning_bilevel.errors import MisconfigurationError, combination_error, flag, one_of
from lightning_bilevel.problem import TOTAL, BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call, RngState
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.strategies.forward_gradient import ForwardGradient
from lightning_bilevel.strategies.slopes import checked_chunk_size
from lightning_bilevel.strategies.tangent_slopes import TangentSlopes
from lightning_bilevel.tree import Params

_FEW = 16
"""Columns that a rehearsal pushes at most."""


class ForwardUnroll(HypergradientStrategy):
    r"""∇h = d Z_T + c with Z_t = A_t Z_{t-1} + B_t, column by column: (∇h)_i = d Z_T e_i + c e_i.

    Exact, like :class:`ReverseUnroll`, with memory that does not grow with the number of inner steps: the
    choice for long runs and few outer parameters. Also known as FGU and FMD.

    Memory: M × ``chunk_size``. Cost: T steps and N tangents pushed through each; with N outer
    parameters in the thousands use :class:`ForwardGradient`.

    With ``warm_start`` (RTHO) Z is carried from outer step to outer step, as θ is: Z ← A_t Z + B_t over all steps of a
    warm run, however few are taken at a time. So nothing is cut off at T steps, which is the cheapest cure of
    short-horizon bias for a handful of outer parameters. Exact for ∇h of the run from its beginning if φ has not moved;
    otherwise Z mixes the φ of then and now, which fades as A_t contracts: a small outer rate. All N columns are held,
    N · M floats, and saved with a checkpoint.

    Source: (FG)²U, arXiv 2406.14095, eq. 4; Franceschi et al., ICML 2017, arXiv 1703.01785, section 3.2 (RTHO).

    Args:
        chunk_size: columns pushed at once; the inner run is repeated per chunk. ``None`` picks the largest that
            fits a memory budget.
        mode: engine, see :mod:`lightning_bilevel.calculus.tangents`.
        warm_start: carry Z on; needs ``inner_start="warm"``.

    Raises:
        ValueError: a bad ``chunk_size``, ``mode`` or ``warm_start``.

    >>> ForwardUnroll(chunk_size=8).exact
    True
    """

    exact = True
    unbiased = True
    differentiates = frozenset({"run"})
    memory = "O(M · chunk)"
    cost = "T steps + T · N tangents"
    weighs_steps = True

    def __init__(self, chunk_size: int | None = None, mode: Mode = "auto", warm_start: bool = False) -> None:
        self.chunk_size = checked_chunk_size("ForwardUnroll", chunk_size)
        self.mode = one_of("ForwardUnroll(mode=...)", Mode, mode)
        self.warm_start = flag("ForwardUnroll(warm_start=...)", warm_start)
        if warm_start:  # exact for a run that began long ago, with another φ
            self.exact = self.unbiased = self.supports_stacking = False

    def small(self, outer_size: int) -> HypergradientStrategy:
        """Return one direction in place of more columns than a rehearsal pushes."""
        return self if outer_size <= _FEW else ForwardGradient(1, Rademacher(), self.chunk_size, mode=self.mode)

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return ∇h(φ); see :meth:`HypergradientStrategy.estimate`."""
        if self.warm_start:
            return self._carried_on(problem, carry, phi, episode)
        size = tree.numel(phi)
        slopes = TangentSlopes(problem, carry.inner, phi, episode, self.mode, self.chunk_size)
        flat = tree.flatten(phi)
        grad = torch.empty_like(flat)
        for first, last in slopes.chunks(0, size):
            grad[first:last] = slopes.along(_units(phi, first, last)).to(grad.dtype)
        return slopes.result(tree.unflatten(grad, phi))

    def refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what cannot be carried on."""
        if not self.warm_start or problem.traits.warm:
            return []
        because, instead = "there is no run that its tangents could go on with", "Use `inner_start='warm'`"
        what = "`ForwardUnroll(warm_start=True)` with an inner level that starts anew"
        return [combination_error(what, because, instead)]

    def _carried_on(self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode) -> Hypergradient:
        size, rng = tree.numel(phi), RngState(tree.device(phi))
        chunks = TangentSlopes(problem, carry.inner, phi, episode, self.mode, self.chunk_size).chunks(0, size)
        before = carry.strategy.get("tangents", {})
        slopes, ended = [], []
        for first, last in chunks:
            rng.restore()
            own = {name: rows[first:last] for name, rows in before.items()}
            run = pushed_run(problem, carry.inner, phi, episode, _units(phi, first, last), self.mode, own)
            slopes.append(run.derivatives)
            # What is shared, and its optimizer state, begins anew.
            on = [name for name in run.tangents if name != TOTAL and name.rpartition(":")[2] not in problem.shared]
            ended.append({name: run.tangents[name] for name in on})
        kept = {name: torch.cat([rows[name] for rows in ended]) for name in ended[0]}
        grads = tree.unflatten(torch.cat(slopes).to(tree.flatten(phi)), phi)
        return run.result._replace(grads=grads, kept={"tangents": kept} if kept else {})


def _units(phi: Params, first: int, last: int) -> Params:
    """Return the unit vectors e_first … e_{last − 1} of φ, stacked.

    >>> _units({"p": torch.zeros(3)}, 1, 2)
    {'p': tensor([[0., 1., 0.]])}
    """
    flat = tree.flatten(phi)
    rows = torch.zeros(last - first, len(flat), dtype=flat.dtype, device=flat.device)
    rows[torch.arange(last - first), torch.arange(first, last)] = 1
    return tree.unflatten(rows, phi)
