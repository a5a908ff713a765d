"""Inner runs at perturbed outer parameters φ + μ v, a chunk of directions at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.inner_loop import Run, run
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.host import rank_zero_warn
from lightning_bilevel.problem import BilevelProblem, Episode, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.strategies.chunks import even
from lightning_bilevel.tree import Params

_Read = Callable[[BilevelProblem, InnerState, Params], Params]
"""(problem, state after the last step, φ) to what is wanted of a run."""


class PerturbedRuns:
    """Repeats one inner run at other values of φ: same start, batches and dropout masks, fresh everything else.

    Args:
        problem: the problem.
        memory: the inner state that every run starts from.
        phi: outer parameters.
        episode: inner and outer batches.
        chunk_size: values of φ run at once, vectorized; 1 repeats the base run's own path, ``None`` takes as many as
            the problem vectorizes well.

    Attributes:
        start: θ_0 at φ itself.
        base: the run at φ itself.
        looped: whether vectorizing failed, so that the runs of a chunk are looped.
    """

    def __init__(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, chunk_size: int | None
    ) -> None:
        self.problem, self.memory, self.phi, self.episode = problem, memory, phi, episode
        limit = max(1, problem.vectorizable // problem.count)
        self._chunk_size = 1 if problem.solver is not None else chunk_size or limit
        self._device = next(iter(phi.values())).device
        self._randomness = RngState(self._device)
        self.start = problem.start(memory, phi)
        self.base: Run = run(problem, self.start, phi, problem.batches(episode))
        self.looped = False

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut ``range(start, stop)`` into chunks."""
        step = even(stop - start, self._chunk_size)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def solutions(self, directions: Params, mu: float) -> Params:
        """Return θ_T at φ + μ v_i: ``(n, *shape)`` per inner parameter."""
        return self._each(directions, mu, lambda problem, final, phi: final.params)

    def values(self, directions: Params, mu: float) -> Tensor:
        """Return h at φ + μ v_i, shape ``(n,)``."""

        def judged(problem: BilevelProblem, final: InnerState, phi: Params) -> Params:
            return {"h": problem.outer_loss(final.params, phi, self.episode.outer, final.buffers).detach()}

        return self._each(directions, mu, judged)["h"]

    def _each(self, directions: Params, mu: float, read: _Read) -> Params:
        count = next(iter(directions.values())).shape[0]
        with RngState(self._device).fork():
            if count > 1 and not self.looped:
                try:
                    return self._vectorized(directions, mu, count, read)
                except MisconfigurationError:
                    raise
                except (RuntimeError, NotImplementedError, TypeError) as error:
                    self.looped = True
                    rank_zero_warn(
                        "The losses cannot be vectorized over directions, so the perturbed runs are looped: "
                        f"{str(error).splitlines()[0]} Set `chunk_size=1` to choose this without a warning."
                    )
            moved = (tree.add(self.phi, tree.index(directions, number), alpha=mu) for number in range(count))
            return tree.stack([self._run(self.problem, self.memory, phi, read) for phi in moved])

    def _vectorized(self, directions: Params, mu: float, count: int, read: _Read) -> Params:
        phi = {name: value + mu * directions[name] for name, value in self.phi.items()}
        buffers = tree.expand(self.memory.buffers, count)
        slots = {slot: tree.expand(values, count) for slot, values in self.memory.slots.items()}
        memory = replace(self.memory, buffers=buffers, slots=slots)
        return self._run(self.problem.perturbed(count), memory, phi, read)

    def _run(self, problem: BilevelProblem, memory: InnerState, phi: Params, read: _Read) -> Params:
        self._randomness.restore()
        final = run(problem, problem.start(memory, phi), phi, problem.batches(self.episode)).state
        return read(problem, final, phi)
