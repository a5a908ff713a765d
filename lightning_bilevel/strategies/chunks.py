"""Directional derivatives of h in chunks: the inner run is repeated per chunk, with the same randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from lightning_bilevel.calculus.autodiff import Mode, directional_derivatives, outer_gradients
from lightning_bilevel.calculus.inner_loop import run
from lightning_bilevel.errors import integer
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.tree import Params

TANGENT_BYTES = 512 * 2**20
"""Memory that the tangents of one chunk may take when the user sets no chunk size."""

TANGENT_BYTES_CPU = 48 * 2**20
"""What is enough on a CPU: with more, page faults take the time that is gained (``benchmarks/chunk_choice.py``)."""

FEWEST_DIRECTIONS = 4
"""Directions that a chunk has on a CPU, as far as memory allows: each chunk repeats the inner run."""


def even(count: int, most: int) -> int:
    """Return the size of chunks of at most ``most`` that share out ``count`` evenly: the last one is not left small.

    >>> even(16, most=15)
    8
    """
    parts = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / parts))


def checked_chunk_size(owner: str, chunk_size: int | None) -> int | None:
    """Return ``chunk_size``; raise the value error unless it is ``None`` or a positive integer."""
    if chunk_size is None:
        return None
    return integer(f"{owner}(chunk_size=...)", chunk_size)


class DirectionalRun:
    """Evaluates ⟨∇h(φ), v⟩ for any number of directions, a chunk of them per inner run.

    Args:
        problem: the problem.
        memory: the inner state to start from.
        phi: outer parameters.
        episode: inner and outer batches.
        mode: engine, see :mod:`lightning_bilevel.calculus.autodiff`.
    """

    def __init__(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, mode: Mode = "auto"
    ) -> None:
        self.problem, self.memory, self.phi, self.episode, self.mode = problem, memory, phi, episode, mode
        self._randomness = RngState(next(iter(phi.values())).device)
        self._last: Hypergradient | None = None

    def chunks(self, start: int, stop: int, size: int | None) -> Iterator[tuple[int, int]]:
        """Cut ``range(start, stop)`` into chunks of at most ``size``; ``None`` picks by memory."""
        step = even(stop - start, size or self._affordable())
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def derivatives(self, directions: Params) -> Tensor:
        """Return ⟨∇h(φ), v_i⟩, shape ``(n,)``, for directions stacked to ``(n, *shape)``."""
        self._last = None  # or its θ_T would be held through this run
        self._randomness.restore()
        values, self._last = directional_derivatives(
            self.problem, self.memory, self.phi, self.episode, directions, self.mode
        )
        return values

    def hypergradient(self, grads: Params) -> Hypergradient:
        """Return ``grads`` with the value, state and metrics of the run they were computed on."""
        if self._last is None:  # a process without a share still takes the inner steps
            self._randomness.restore()
            start = self.problem.start(self.memory, self.phi)
            state, metrics = run(self.problem, start, self.phi, self.problem.batches(self.episode))
            value, _, _ = outer_gradients(self.problem, state, self.phi, self.episode)
            self._last = Hypergradient(value, grads, state, metrics)
        return self._last._replace(grads=grads)

    def _affordable(self) -> int:
        state = self.problem.start(self.memory, self.phi).flat()
        # Measured: the tangents before and after a step, the gradient's and what the update makes on the way, half of
        # that where it goes through θ in parts; and the direction.
        per_direction = sum(4 * value.numel() * value.element_size() for value in state.values())
        per_direction += sum(value.numel() * value.element_size() for value in self.phi.values())
        most, enough = (size // max(1, per_direction) for size in (TANGENT_BYTES, TANGENT_BYTES_CPU))
        if next(iter(self.phi.values())).device.type == "cpu":
            most = min(most, max(enough, FEWEST_DIRECTIONS))
        return max(1, most)
