"""Exact slopes of h along directions, by tangents: the inner run is repeated per chunk, with the same randomness."""

from __future__ import annotations

from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.outer import outer_value_and_grads
from lightning_bilevel.calculus.runs import pushed_run, run
from lightning_bilevel.calculus.step import Mode
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.strategies.slopes import Slopes
from lightning_bilevel.tree import Params

TANGENT_BYTES = 512 * 2**20
"""Memory that the tangents of one chunk may take when the user sets no chunk size."""

TANGENT_BYTES_CPU = 48 * 2**20
"""What is enough on a CPU: beyond, page faults take the time that is gained (``benchmarks/cost/chunk_choice.py``)."""

FEWEST_DIRECTIONS = 4
"""Directions that a chunk has on a CPU, as far as memory allows: each chunk repeats the inner run."""

MOST_COMPILED = 16
"""Directions in a chunk that is pushed by compiled graphs, which have operations of their own for each: half a second
or more to compile."""


class TangentSlopes(Slopes):
    """Evaluates ⟨∇h(φ), v⟩, a chunk of directions per inner run.

    Args:
        problem: the problem.
        carried: the inner state to start from.
        phi: outer parameters.
        episode: inner and outer batches.
        mode: engine, see :mod:`lightning_bilevel.calculus.tangents`.
        size: directions in a chunk; ``None`` picks by memory.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        carried: InnerState,
        phi: Params,
        episode: Episode,
        mode: Mode = "auto",
        size: int | None = None,
    ) -> None:
        self.problem, self.carried, self.phi, self.episode, self.mode = problem, carried, phi, episode, mode
        self._size = size
        self._rng = RngState(tree.device(phi))
        self._last: Hypergradient | None = None

    def chunk_size(self) -> int:
        """Return the size that was asked for, or the largest whose tangents fit the memory meant for them."""
        if self._size is not None:
            return self._size
        state = self.problem.start(self.carried, self.phi).flat()
        # Measured: the tangents before and after a step, the gradient's and what the update makes on the way, half of
        # that where it goes through θ in parts; and the direction.
        per_direction = sum(4 * value.numel() * value.element_size() for value in state.values())
        per_direction += sum(value.numel() * value.element_size() for value in self.phi.values())
        most, enough = (size // max(1, per_direction) for size in (TANGENT_BYTES, TANGENT_BYTES_CPU))
        if tree.device(self.phi).type == "cpu":
            most = min(most, max(enough, FEWEST_DIRECTIONS))
        if self.problem.compiler is not None:
            most = min(most, MOST_COMPILED)
        return max(1, most)

    def along(self, directions: Params) -> Tensor:
        """Return ⟨∇h(φ), v_i⟩ by one inner run."""
        self._last = None  # or its θ_T would be held through this run
        self._rng.restore()
        pushed = pushed_run(self.problem, self.carried, self.phi, self.episode, directions, self.mode)
        self._last = pushed.result
        return pushed.derivatives

    def result(self, grads: Params) -> Hypergradient:
        """Return ``grads`` with what belongs to the last run; a process without a share takes the steps now."""
        if self._last is None:
            self._rng.restore()
            start = self.problem.start(self.carried, self.phi)
            state, metrics = run(self.problem, start, self.phi, self.problem.batches(self.episode))
            end = outer_value_and_grads(self.problem, state, self.phi, self.episode)
            self._last = Hypergradient(end.value, grads, state, metrics, observed=end.observed)
        return self._last._replace(grads=grads)
