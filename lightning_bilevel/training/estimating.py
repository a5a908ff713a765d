"""The surroundings in which a module's losses are evaluated for an estimate, and one estimate in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lightning_bilevel import tree
from lightning_bilevel.data.inputs import parts
from lightning_bilevel.errors import MisconfigurationError, combination_error, missing_error, refuse
from lightning_bilevel.estimation import estimate, stack_size, vectorizes
from lightning_bilevel.modules.examine import Examination, examination_of, examine, once_differentiable
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.written import versions_of, written_to_batch
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient, InnerState
from lightning_bilevel.randomness import Call, Key, RngState, repeating
from lightning_bilevel.strategies.base import HypergradientStrategy
from lightning_bilevel.training.memory import FitMemory
from lightning_bilevel.tree import Params

PARTS = "how many parts an inner batch has"
"""Key of :attr:`FunctionalModule.findings`."""


class Surroundings(NamedTuple):
    """What an estimate on a module is made from.

    Attributes:
        problem: the module as pure functions.
        carried: the inner state that each episode starts from.
        kept: what the strategy carries.
        phi: outer parameters.
        episodes: at least one.
        examination: what a first look at the losses told.
        generators: of the process, those that the losses are known to draw from.
        drawn: at the end, the generators that were drawn from besides; they stand as before.
    """

    problem: BilevelProblem
    carried: list[InnerState]
    kept: dict[str, Params]
    phi: Params
    episodes: Sequence[Episode]
    examination: Examination
    generators: list[Any]
    drawn: list[Any]


class Reach:
    """Finds out which outer parameters no episode has reached so far.

    An episode may use some only (one penalty per domain, sampled operations, experts): zero gradients are right there.

    Attributes:
        unreached: their names; ``None`` before the first look.
    """

    def __init__(self) -> None:
        self.unreached: set[str] | None = None

    def look(self, functional: FunctionalModule, memory: FitMemory, at: Surroundings) -> None:
        """Look at further episodes while there are names that none has reached; refuse where there are no others."""
        episodes = at.episodes
        if self.unreached is None:
            self.unreached, episodes = set(at.examination.unreached), at.episodes[1:]
        for episode in episodes:
            if not self.unreached:
                return
            self.unreached &= set(examine(functional, memory.values(functional), episode).unreached)
        if len(self.unreached) == len(functional.levels.outer):
            raise self.error(functional)

    def error(self, functional: FunctionalModule) -> MisconfigurationError:
        """Return what to say of the names that none has reached."""
        names = [name for name in functional.levels.outer if name in (self.unreached or ())]
        return missing_error(
            type(functional.module).__name__,
            f"loss that depends on the outer parameters {names}",
            "Use them in `inner_loss`, `outer_loss` or `configure_inner_optimizer`, looked up on `self` at "
            "every call, or do not select them in `outer_parameters()`; with `allow_unused=True` they stay as they are",
        )


@contextmanager
def estimating(
    functional: FunctionalModule,
    memory: FitMemory,
    episodes: Sequence[Episode],
    masks: Key,
    *,
    twice: bool = True,
    carry: Carry | None = None,
    inner_steps: int | None = None,
    check: Callable[[BilevelProblem], None] = lambda problem: None,
) -> Iterator[Surroundings]:
    """Enter safe kernels, record logs, seed what the losses draw, and look at the losses once.

    Args:
        functional: the module.
        memory: what goes on from step to step.
        episodes: checked ones, at least one.
        masks: names what the losses draw (dropout). The global generators are left as they are, so that a resumed fit
            goes on with the masks of the one that was cut off.
        twice: whether losses are differentiated twice.
        carry: goes before ``memory``: what the strategy carries, buffers, and θ where it is warm.
        inner_steps: other than the module's.
        check: refuses the problem before anything of it is evaluated.

    Raises:
        MisconfigurationError: inner parameters that the losses do not see, or a warm start of several episodes.
    """
    several, inner_only = len(episodes) > 1, functional.levels.inner_only
    if several and functional.module.goes_on and inner_only:
        raise combination_error(
            f"`inner_start={functional.module.inner_start!r}` with {len(episodes)} episodes in a batch",
            f"{inner_only[0]} would continue from several ends at once",
            "Use `inner_start='reset'`, or one episode per batch",
        )

    def problem() -> BilevelProblem:
        whole = functional.problem
        return whole if inner_steps is None else replace(whole, inner_steps=inner_steps)

    functional.findings[PARTS] = parts(episodes[0].inner[0])
    with functional.session(twice, lambda: check(problem())) as before:
        examination = examination_of(functional, memory.values(functional), episodes[0])
        generators = [*examination.generators, *functional.drawn]
        if generators:
            functional.vectorizes = False  # what NumPy draws, all episodes of a stack would share
        carried = memory.recall(functional, examination.buffers, len(episodes))
        kept = memory.recall_strategy(functional.device)
        if carry is not None:
            carried = [_gone_on(functional, state, carry.inner, len(episodes)) for state in carried]
            kept = carry.strategy
        marks = versions_of(episodes[0].inner[0]), versions_of(episodes[0].outer)
        drawn: list[Any] = []
        try:
            with (
                repeating([*functional.generators, *generators]),
                RngState(functional.device).fork(masks.fold_in(-1).seed),
            ):
                phi = functional.phi()
                yield Surroundings(problem(), carried, kept, phi, episodes, examination, generators, drawn)
        finally:  # also where an estimate raises
            drawn += before.drawn()
            before.restore(drawn)
        if marks != (versions_of(episodes[0].inner[0]), versions_of(episodes[0].outer)):
            raise written_to_batch(type(functional.module).__name__)


def estimated(
    functional: FunctionalModule,
    memory: FitMemory,
    strategy: HypergradientStrategy,
    episodes: Sequence[Episode],
    call: Call,
    masks: Key | None = None,
    carry: Carry | None = None,
    inner_steps: int | None = None,
    reach: Reach | None = None,
) -> Hypergradient:
    """Return the mean estimate over episodes of a module.

    Args:
        functional: the module.
        memory: what goes on from step to step; it is read only.
        strategy: the estimator.
        episodes: checked ones, at least one.
        call: names the estimate.
        masks: see :func:`estimating`; default the key of ``call``.
        carry: see :func:`estimating`.
        inner_steps: see :func:`estimating`.
        reach: of a fit, which may reach an outer parameter later; by default, all have to be reached now.
    """
    options: dict[str, Any] = {"twice": strategy.second_order, "carry": carry, "inner_steps": inner_steps}
    with estimating(functional, memory, episodes, masks or call.key, **options, check=strategy.check) as at:
        refuse(_refusals(functional, strategy, at))
        if not functional.module.allow_unused:
            found = reach or Reach()
            found.look(functional, memory, at)
            if reach is None and found.unreached:
                raise found.error(functional)
        result = estimated_at(functional, strategy, at, call)
    known = [*functional.generators, *at.generators]
    unseen = [each for each in at.drawn if not any(each is one for one in known)]
    if not unseen:
        return result
    # The first look saw none of it. Now they are known: this estimate is made again, with draws that are repeated.
    functional.drawn += unseen
    functional.findings.clear()
    return estimated(functional, memory, strategy, episodes, call, masks, carry, inner_steps, reach)


def estimated_at(
    functional: FunctionalModule, strategy: HypergradientStrategy, at: Surroundings, call: Call
) -> Hypergradient:
    """Return the mean estimate in surroundings that were entered, also where second derivatives are left out."""

    def works() -> bool:
        if functional.vectorizes is None:  # tried once per fit
            functional.vectorizes = vectorizes(at.problem, at.carried[0], at.phi, at.episodes[0])
        return functional.vectorizes

    size = stack_size(at.problem, at.episodes, functional.module.episode_chunk_size, works)
    return estimate(at.problem, strategy, at.carried, at.phi, at.episodes, call, size, at.kept)


def _refusals(
    functional: FunctionalModule, strategy: HypergradientStrategy, at: Surroundings
) -> list[MisconfigurationError]:
    """Return what a strategy cannot work with in these losses."""
    marked = _marked_once_differentiable(functional, strategy, at)
    if not marked:
        return []
    name, _ = marked[0]
    return [
        combination_error(
            f"`{type(strategy).__name__}` with `{name}` in `{type(functional.module).__name__}.inner_loss`",
            f"`{name}` is marked `once_differentiable`, so that autograd would leave its second derivative out "
            "without a word",
            "Write its `backward` with differentiable operations and drop the mark, or use `PZOBO`",
        )
    ]


def _marked_once_differentiable(
    functional: FunctionalModule, strategy: HypergradientStrategy, at: Surroundings
) -> tuple[tuple[str, str], ...]:
    """Return the functions in the inner loss that are marked so, where ``strategy`` differentiates it twice."""
    if not functional.module.has_solver:
        return at.examination.once_differentiable if strategy.second_order else ()
    # A user's solver takes its own derivatives; what is left is the inner loss of the implicit gradient, which the
    # first look leaves out: others never evaluate it.
    if "inner_gradient" not in strategy.all_differentiates:
        return ()
    if _BESIDE_A_SOLVER not in functional.examinations:
        phi, state = tree.leaves(at.phi), at.carried[0]
        with torch.enable_grad(), RngState(functional.device).fork():
            theta = tree.leaves(at.problem.on(at.episodes[0]).start(state, phi).params)
            loss, _ = at.problem.inner_loss(theta, phi, at.episodes[0].inner[0], state.buffers)
        functional.examinations[_BESIDE_A_SOLVER] = tuple(once_differentiable(loss))
    found: tuple[tuple[str, str], ...] = functional.examinations[_BESIDE_A_SOLVER]
    return found


_BESIDE_A_SOLVER = "the inner loss of a module with a solver"
"""Key of :attr:`FunctionalModule.examinations`."""


def _gone_on(functional: FunctionalModule, state: InnerState, last: InnerState, episodes: int) -> InnerState:
    """Return the state to start from after an estimate that ended in ``last``."""
    own = functional.levels.inner_only
    if episodes > 1:
        return state
    buffers = {name: last.buffers.get(name, value) for name, value in state.buffers.items()}
    if functional.module.inner_start != "warm" or not own:
        return InnerState(state.params, buffers, state.opt_state, state.steps)
    opt_state = {slot: {name: values[name] for name in own} for slot, values in last.opt_state.items()}
    return InnerState({name: last.params[name] for name in own}, buffers, opt_state, last.steps)
