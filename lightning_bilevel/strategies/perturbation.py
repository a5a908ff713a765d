"""Inner runs at perturbed outer parameters φ + μ v, a chunk of directions at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.inner_loop import Run, run
from lightning_bilevel.problem import BilevelProblem, Episode, InnerState
from lightning_bilevel.safe import Randomness
from lightning_bilevel.tree import Params


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
        base: the run at φ itself.
    """

    def __init__(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, chunk_size: int | None
    ) -> None:
        self.problem, self.memory, self.phi, self.episode = problem, memory, phi, episode
        limit = max(1, problem.vectorizable // problem.count)
        self._chunk_size = 1 if problem.solver is not None else chunk_size or limit
        self._device = next(iter(phi.values())).device
        self._randomness = Randomness(self._device)
        self.base: Run = run(problem, problem.start(memory, phi), phi, problem.batches(episode))

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut ``range(start, stop)`` into chunks."""
        for first in range(start, stop, self._chunk_size):
            yield first, min(first + self._chunk_size, stop)

    def at(self, directions: Params, mu: float) -> tuple[Params, Tensor]:
        """Return θ_T and h at φ + μ v_i: ``(n, *shape)`` per inner parameter, and ``(n,)``."""
        count = next(iter(directions.values())).shape[0]
        with Randomness(self._device).preserved():
            if count == 1:
                phi = tree.add(self.phi, tree.index(directions, 0), alpha=mu)
                theta, value = self._run(self.problem, self.memory, phi)
                return {name: values[None] for name, values in theta.items()}, value[None]
            phi = {name: value + mu * directions[name] for name, value in self.phi.items()}
            buffers = tree.expand(self.memory.buffers, count)
            slots = {slot: tree.expand(values, count) for slot, values in self.memory.slots.items()}
            memory = replace(self.memory, buffers=buffers, slots=slots)
            return self._run(self.problem.perturbed(count), memory, phi)

    def _run(self, problem: BilevelProblem, memory: InnerState, phi: Params) -> tuple[Params, Tensor]:
        self._randomness.restore()
        final = run(problem, problem.start(memory, phi), phi, problem.batches(self.episode)).state
        return final.params, problem.outer_loss(final.params, phi, self.episode.outer, final.buffers).detach()
