"""One hypergradient strategy after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_bilevel.errors import MisconfigurationError, combination_error, integer, value_error
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.strategies.base import HypergradientStrategy, kept_of
from lightning_bilevel.tree import Params


class HypergradientSchedule(HypergradientStrategy):
    r"""Phases of hypergradient strategies: cheap and biased first, unbiased to finish.

    The facts (exact, memory, …) are those of the phase that runs; what is true of all phases is
    true of the schedule. The phase follows from the optimizer steps taken, so it survives a resume and
    counts one step per accumulation. Logged as ``hypergradient_phase``, from 0. What a strategy carries belongs to its
    phase: a memory of the phase before does not go over, and the next one begins to remember anew.

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
    differentiates = frozenset({"run"})
    memory = "that of the phase"
    cost = "that of the phase"

    def __init__(self, phases: Sequence[tuple[HypergradientStrategy, int | None]]) -> None:
        pairs = isinstance(phases, Sequence) and all(isinstance(each, Sequence) and len(each) == 2 for each in phases)
        if not pairs or not all(isinstance(strategy, HypergradientStrategy) for strategy, _ in phases):
            hint = "Say when the next one takes over: `[(FirstOrder(), 100), (ReverseUnroll(), None)]`."
            raise value_error("HypergradientSchedule(phases=...)", "a list of (strategy, steps)", phases, hint)
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
        self.differentiates = frozenset().union(*(member.differentiates for member in members))
        self.direction_parallel = all(member.direction_parallel for member in members)
        self.weighs_steps = all(member.weighs_steps for member in members)
        self.supports_stacking = all(member.supports_stacking for member in members)

    def phase(self, step: int) -> int:
        """Return the number of the phase that takes optimizer step ``step``, both from 0."""
        end = 0
        for number, (_, steps) in enumerate(self.phases):
            if steps is None or step < (end := end + steps):
                return number
        raise AssertionError("the last phase has no end")

    def estimate(
        self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call
    ) -> Hypergradient:
        """Return the estimate of the present phase's strategy."""
        number = self.phase(call.step)
        name = f"phase {number}"
        result = self.phases[number][0].estimate(problem, carry.of(name), phi, episode, call)
        others = {key: kept for key, kept in carry.strategy.items() if not key.startswith(f"{name}/")}
        phase = {"hypergradient_phase": torch.tensor(float(number))}
        return result._replace(metrics={**result.metrics, **phase}, kept={**others, **kept_of(name, result)})

    def averaged(self, result: Hypergradient) -> Hypergradient:
        """Let the phase that made the estimate bring up to date what it carries."""
        name, phase = self._phase_of(result)
        own = phase.averaged(result._replace(kept=result.carry.of(name).strategy))
        return own._replace(kept={**result.kept, **kept_of(name, own)})

    def explained(self, result: Hypergradient, cosine: float) -> dict[str, torch.Tensor]:
        """Return what the phase that made the estimate says about it."""
        return self._phase_of(result)[1].explained(result, cosine)

    def _phase_of(self, result: Hypergradient) -> tuple[str, HypergradientStrategy]:
        number = round(result.metrics["hypergradient_phase"].item())
        return f"phase {number}", self.phases[number][0]

    def members(self) -> Mapping[str, HypergradientStrategy]:
        """Return the strategy of every phase."""
        return {f"phase {number}": strategy for number, (strategy, _) in enumerate(self.phases)}

    def _refused_solver(self, problem: BilevelProblem) -> list[MisconfigurationError]:
        return []  # its facts are those of its phases, which refuse for themselves

    def state_dict(self) -> dict[str, Any]:
        """Return the number of phases, which a resumed run has to have."""
        return {"phases": len(self.phases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the number of phases.

        Raises:
            MisconfigurationError: it is another.
        """
        if state_dict["phases"] != len(self.phases):
            raise combination_error(
                f"a `HypergradientSchedule` of {len(self.phases)} phases with this checkpoint",
                f"it was written with {state_dict['phases']}",
                "Resume with the schedule of that run; the steps of a phase may change",
            )
