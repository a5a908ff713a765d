"""One hypergradient strategy after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel.errors import MisconfigurationError, combination_error, integer, value_error
from lightning_bilevel.host import Trainer
from lightning_bilevel.problem import BilevelProblem, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.tree import Params


class HypergradientSchedule(HypergradientStrategy):
    r"""Phases of hypergradient strategies: cheap and biased first, unbiased to finish.

    The facts (exact, memory, …) are those of the phase that runs; what is true of all phases is
    true of the schedule. The phase follows from the optimizer steps taken, so it survives a resume and
    counts one step per accumulation. Logged as ``hypergradient_phase``, from 0.

    Source: the two-phase paradigm of (FG)²U, arXiv 2406.14095, section 3.3.

    Args:
        phases: (strategy, optimizer steps) in order; the last one's steps are ``None``: until the end.

    Raises:
        ValueError: no phase, or a wrong number of steps.

    >>> from lightning_bilevel import ForwardGradient, TruncatedReverse
    >>> schedule = HypergradientSchedule([(TruncatedReverse(5), 100), (ForwardGradient(16), None)])
    >>> schedule.phase(99), schedule.phase(100)
    (0, 1)
    """

    exact = False
    unbiased = False
    requires = "solve"
    second_order = True
    memory = "that of the phase"
    cost = "that of the phase"

    def __init__(self, phases: Sequence[tuple[HypergradientStrategy, int | None]]) -> None:
        if not phases or phases[-1][1] is not None:
            raise value_error(
                "HypergradientSchedule(phases=...)",
                "a list of (strategy, steps) that ends with (strategy, None)",
                phases,
            )
        for strategy, steps in phases[:-1]:
            integer(f"HypergradientSchedule steps of {type(strategy).__name__}", steps)
        self.phases = [(strategy, steps) for strategy, steps in phases]
        members = [strategy for strategy, _ in phases]
        self.exact = all(member.exact for member in members)
        self.unbiased = all(member.unbiased for member in members)
        self.second_order = any(member.second_order for member in members)
        self.direction_parallel = all(member.direction_parallel for member in members)
        self.stacks = all(member.stacks for member in members)

    def phase(self, step: int) -> int:
        """Return the number of the phase that takes optimizer step ``step``, both from 0."""
        end = 0
        for number, (_, steps) in enumerate(self.phases):
            if steps is None or step < (end := end + steps):
                return number
        raise AssertionError("the last phase has no end")

    def estimate(
        self, problem: BilevelProblem, memory: InnerState, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the estimate of the present phase's strategy."""
        number = self.phase(call.step)
        result = self.phases[number][0].estimate(problem, memory, phi, episode, call)
        return result._replace(metrics={**result.metrics, "hypergradient_phase": torch.tensor(float(number))})

    def all_refusals(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        """Return what any phase cannot work with; a schedule as such works with everything."""
        return [refusal for strategy, _ in self.phases for refusal in strategy.all_refusals(problem)]

    def check_trainer(self, trainer: Trainer) -> None:
        """Let every phase look at the Trainer."""
        for strategy, _ in self.phases:
            strategy.check_trainer(trainer)

    def carried(self) -> list[Tensor]:
        """Return what every phase carries."""
        return [value for strategy, _ in self.phases for value in strategy.carried()]

    def state_dict(self) -> dict[str, Any]:
        """Return every phase's state."""
        return {"phases": [strategy.state_dict() for strategy, _ in self.phases]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every phase's state.

        Raises:
            MisconfigurationError: it is that of another number of phases.
        """
        if len(state_dict["phases"]) != len(self.phases):
            raise combination_error(
                f"a `HypergradientSchedule` of {len(self.phases)} phases with this checkpoint",
                f"it was written with {len(state_dict['phases'])}",
                "Resume with the schedule of that run; the steps of a phase may change",
            )
        for (strategy, _), state in zip(self.phases, state_dict["phases"], strict=True):
            strategy.load_state_dict(state)
