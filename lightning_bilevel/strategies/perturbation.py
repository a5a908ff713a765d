"""Inner runs at perturbed outer parameters φ + μ v, a chunk of directions at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import outer_value
from lightning_bilevel.calculus.runs import Run, run
from lightning_bilevel.calculus.step import inner_step
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import BilevelProblem, Episode, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.strategies.rounding import CoarsestDtype, coarser
from lightning_bilevel.tree import Params

_Read = Callable[[BilevelProblem, InnerState, Params], Params]
"""(problem, state after the last step, φ) to what is wanted of a run."""


class PerturbedRuns:
    """Repeats one inner run at other values of φ: same start, batches and dropout masks, fresh everything else.

    Args:
        problem: the problem.
        carried: the inner state that every run starts from.
        phi: outer parameters.
        episode: inner and outer batches.
        chunk_size: values of φ run at once, vectorized; 1 repeats the base run's own path, ``None`` takes as many as
            the problem vectorizes well.

    Attributes:
        start: θ_0 at φ itself.
        base: the run at φ itself.
    """

    def __init__(
        self, problem: BilevelProblem, carried: InnerState, phi: Params, episode: Episode, chunk_size: int | None
    ) -> None:
        self.problem, self.carried, self.phi, self.episode = problem, carried, phi, episode
        self._chunk_size = 1 if problem.solver is not None else chunk_size or problem.max_copies
        self._device = tree.device(phi)
        self._rng = RngState(self._device)
        self.start = problem.start(carried, phi)
        self.base: Run = run(problem, self.start, phi, problem.batches(episode))

    @property
    def chunk_size(self) -> int:
        """Runs that are vectorized together; 1 where that has failed."""
        return 1 if self.problem.findings.get(_LOOPED) else self._chunk_size

    def solutions(self, directions: Params, mu: float) -> Params:
        """Return θ_T at φ + μ v_i: ``(n, *shape)`` per inner parameter."""
        return self._each(directions, mu, lambda problem, final, phi: final.params)

    def values(self, directions: Params, mu: float) -> Tensor:
        """Return h at φ + μ v_i, shape ``(n,)``."""

        def judged(problem: BilevelProblem, final: InnerState, phi: Params) -> Params:
            return {"h": outer_value(problem, final, phi, self.episode)[0]}

        return self._each(directions, mu, judged)["h"]

    def ends(self, directions: Params, mu: float, states: InnerState) -> tuple[Tensor, InnerState]:
        """Return h at φ + μ v_i, shape ``(n,)``, and the ends of the runs, each from a state of its own.

        Args:
            directions: v, stacked: ``(n, *shape)`` per outer parameter.
            mu: μ.
            states: the states that the runs start from, stacked.
        """

        def judged(problem: BilevelProblem, final: InnerState, phi: Params) -> Params:
            value, _ = outer_value(problem, final, phi, self.episode)
            buffers = {f"{_BUFFER}{name}": buffer for name, buffer in final.buffers.items()}
            return {_H: value, **replace(final, total=None).flat(), **buffers}

        found = self._each(directions, mu, judged, states)
        buffers = {name: found[f"{_BUFFER}{name}"] for name in self.base.state.buffers}
        return found[_H], replace(self.base.state, buffers=buffers).unflat(found)

    def _each(self, directions: Params, mu: float, read: _Read, states: InnerState | None = None) -> Params:
        count = tree.count(directions)
        # Views, where all start from the same.
        starts = self.carried.map(lambda value: value.expand(count, *value.shape)) if states is None else states
        with RngState(self._device).fork():
            if count > 1 and not self.problem.findings.get(_LOOPED):
                try:
                    found = self._vectorized(directions, mu, starts, read)
                    if not self.problem.findings.get(_COMPARED):
                        self._compare(directions, mu, starts, read, found)
                    return found
                except MisconfigurationError:
                    raise
                except (RuntimeError, NotImplementedError, TypeError) as error:
                    self.problem.findings[_LOOPED] = True
                    rank_zero_warn(
                        "The losses cannot be vectorized over directions, so the perturbed runs are looped: "
                        f"{str(error).splitlines()[0]} Set `chunk_size=1` to choose this without a warning."
                    )
            return tree.stack([self._alone(number, directions, mu, starts, read) for number in range(count)])

    def _alone(self, number: int, directions: Params, mu: float, starts: InnerState, read: _Read) -> Params:
        moved = tree.add(self.phi, tree.index(directions, number), alpha=mu)
        return self._run(self.problem, starts.map(lambda value: value[number]), moved, read)

    def _compare(self, directions: Params, mu: float, starts: InnerState, read: _Read, found: Params) -> None:
        """Raise unless the first of the vectorized runs is that of a loop: hooks, for one, are not called there."""
        with coarsest(self.problem, self.carried, self.phi, self.episode) as seen:
            alone = self._alone(0, directions, mu, starts, read)
        alone = {name: value for name, value in alone.items() if not _counts(value)}
        first = {name: found[name][0] for name in alone}
        difference, size = tree.norm(tree.sub(alone, first)), tree.norm(alone)
        half = torch.finfo(coarser(size.dtype, seen.dtype or size.dtype)).bits < 32
        if not difference <= (_ALIKE_IN_HALF if half else _ALIKE) * size:
            raise RuntimeError(
                f"they end elsewhere than one by one, by {(difference / size).item():.1g} of the length."
            )
        self.problem.findings[_COMPARED] = True

    def _vectorized(self, directions: Params, mu: float, starts: InnerState, read: _Read) -> Params:
        phi = {name: value + mu * directions[name] for name, value in self.phi.items()}
        count = tree.count(phi)
        return self._run(self.problem.vmapped(count, over="phi"), starts, phi, read)

    def _run(self, problem: BilevelProblem, carried: InnerState, phi: Params, read: _Read) -> Params:
        self._rng.restore()
        final = run(problem, problem.start(carried, phi), phi, problem.batches(self.episode)).state
        return read(problem, final, phi)


@contextmanager
def coarsest(problem: BilevelProblem, carried: InnerState, phi: Params, episode: Episode) -> Iterator[CoarsestDtype]:
    """Find the floating dtype of least precision of what is computed in this context.

    Graphs tell of no dtype, and in a mode they would be others: where a problem has some, a step and the outer loss are
    computed first, operation by operation.

    Args:
        problem: the problem.
        carried: the inner state that runs start from.
        phi: outer parameters.
        episode: inner and outer batches.
    """
    if problem.compiler is None:
        with CoarsestDtype() as seen:
            yield seen
        return
    problem = replace(problem.judged_at_the_end(), compiler=None)
    with CoarsestDtype() as seen, RngState(tree.device(phi)).fork():
        state = problem.start(carried, phi)
        if problem.solver is None:
            state, _ = inner_step(problem)(state, phi, problem.batches(episode)[0])
        outer_value(problem, state, phi, episode)
    yield seen


def _counts(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


_H, _BUFFER = ":h", ":buffer:"
"""Names beside those of :meth:`InnerState.flat`."""

_LOOPED = "the losses do not vectorize over phi"
_COMPARED = "vectorized over phi, a run was that of a loop"
"""Keys of :attr:`BilevelProblem.findings`."""

_ALIKE, _ALIKE_IN_HALF = 1e-3, 5e-2
"""Relative distance of the ends of two runs beyond which they are not the same: rounding stays below it."""
