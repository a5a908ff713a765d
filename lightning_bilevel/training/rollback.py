"""``inner_start="rollback"``: virtual inner steps for the hypergradient, then the real ones with the new φ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_bilevel import tree
from lightning_bilevel.calculus.runs import run
from lightning_bilevel.errors import nonfinite_error
from lightning_bilevel.host import Trainer
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Key
from lightning_bilevel.training.estimating import estimating
from lightning_bilevel.training.memory import FitMemory
from lightning_bilevel.tree import Params


class Rollback:
    """The inner steps of a batch that are still to be taken, once the outer optimizer has stepped.

    Args:
        functional: the module.
        memory: what goes on from step to step.
    """

    def __init__(self, functional: FunctionalModule, memory: FitMemory) -> None:
        self._functional, self._memory = functional, memory
        self._held: tuple[Episode, Key, Params] | None = None

    def holds(self, trainer: Trainer) -> bool:
        """Return whether the end of this batch's inner run is not to stay.

        In a batch whose gradient is only accumulated φ stays as it is, so that the virtual steps are the real ones.
        """
        module = self._functional.module
        if module.inner_start != "rollback" or not self._functional.levels.inner_only:
            return False
        return trainer.strategy.handles_gradient_accumulation or not trainer.fit_loop._should_accumulate()

    def hold(self, episodes: Sequence[Episode], masks: Key, result: Hypergradient) -> None:
        """Keep what the real steps need: batches, masks, and the buffers that the outer loss has left."""
        (episode,) = episodes
        self._held = episode, masks, result.state.buffers

    def drop(self) -> None:
        """Forget what is held: nothing of this batch counts."""
        self._held = None

    def take(self) -> InnerState | None:
        """Return the end of the real steps, with φ as it is now; ``None`` where none are due.

        They see the batches and the masks of the virtual ones. Buffers that they leave alone are as the estimate, whose
        outer loss may count something, has left them.

        Raises:
            FloatingPointError: an inner loss, or θ_T, is nan or infinite.
        """
        if self._held is None:
            return None
        (episode, masks, left), self._held = self._held, None
        surroundings = estimating(self._functional, self._memory, [episode], masks, twice=False)
        with torch.enable_grad(), surroundings as at:
            problem, before = at.problem.judged_at_the_end().on(episode), at.carried[0]
            state, _ = run(problem, problem.start(before, at.phi), at.phi, problem.batches(episode))
        if name := tree.first_nonfinite(state.params):
            hint = "Lower the inner learning rate, or take fewer inner steps."
            raise nonfinite_error(f"inner parameter `{name}` after the inner steps with the new φ", "nan or inf", hint)
        changed = {n: value for n, value in state.buffers.items() if not torch.equal(value, before.buffers[n])}
        return InnerState(state.params, {**left, **changed}, state.opt_state, state.steps)


def after_each_batch(trainer: Trainer, action: Callable[[], None]) -> Callable[[], None]:
    """Call ``action`` after each batch's optimizer step, before any callback or checkpoint sees its end.

    Returns:
        Undoes it.
    """
    loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
    original = loop.run

    def shadow(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action()
        return result

    def undo() -> None:
        if vars(loop).get("run") is shadow:
            del loop.run

    loop.run = shadow
    return undo
