"""Which graphs hold now: made once for each kind of batch and each thing that the user's Python does."""

from __future__ import annotations

from collections.abc import Hashable

from lightning_bilevel.calculus.base import Condition, InnerStep
from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.compiled.fingerprint import Fingerprint, fingerprint
from lightning_bilevel.compiled.losses import CompiledLosses, shapes
from lightning_bilevel.compiled.plan import FIRST, Graphs, Plan, takes_number
from lightning_bilevel.compiled.program import Form, Layout
from lightning_bilevel.compiled.reasons import NotCompiled, Refusals
from lightning_bilevel.compiled.sight import Sight, Sights
from lightning_bilevel.compiled.step import CompiledStep
from lightning_bilevel.compiled.whole import Judged
from lightning_bilevel.host import rank_zero_info
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import Batch, InnerState
from lightning_bilevel.tree import Params


class Compiler:
    """Makes compiled steps of the steps of a module's problems, and keeps their graphs.

    What cannot be compiled is eager, with one warning that says why. Each graph is compared with the eager step when it
    is made.

    Attributes:
        losses: values and derivatives of the losses, by graphs.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Graphs] = {}
        self._sights, self._refusals = Sights(), Refusals()
        self._said: set[str] = set()
        self.losses = CompiledLosses(self._sights, self._refusals)

    def compiled(self, step: GradientStep) -> InnerStep:
        """Return a step that is computed by graphs where there are some."""
        return step if self._refusals.holds("steps") else CompiledStep(step, self)

    def condition(self, step: CompiledStep, state: InnerState, phi: Params, batch: Batch) -> Condition | None:
        """Return the condition that ∇g is zero; ``None`` where it has to be eager."""
        return self.losses.condition(step.problem, state, phi, batch)

    def plan(self, step: CompiledStep, state: InnerState, phi: Params, batch: Batch) -> Plan | None:
        """Return the graphs for a batch, ``None`` where the step has to be eager."""
        if self._refusals.holds("steps"):
            return None
        try:
            made_of = fingerprint(step.problem)
        except NotCompiled as error:  # of this strategy; what else the fit has may go on
            self._refusals.say("steps", error)
            return None
        try:
            return self._plan(step, made_of, state, phi, batch)
        except NotCompiled as error:
            self.refuse(error)
            return None

    def refuse(self, error: NotCompiled) -> None:
        """Take no step by graphs any more, and say why."""
        self._graphs = {}
        self._refusals.refuse("steps", error)

    def _plan(self, step: CompiledStep, made_of: Fingerprint, state: InnerState, phi: Params, batch: Batch) -> Plan:
        functional = made_of.functional
        sight, flat = self._sights.of(made_of, step.problem.stacked, batch, "inner")
        optimizer = functional.inner_optimizer()
        where = (made_of.key, step.eager.mode, flat.rest, shapes(state.flat()), shapes(phi), shapes(state.buffers))
        present = self._present(sight, functional, optimizer)
        graphs = self._graphs.get((where, present))
        tensors = [*(tensor.detach().contiguous() for tensor in flat.tensors), *made_of.held]
        if graphs is None:
            functional.turn()
            if self._present(sight, functional, optimizer) != present:
                raise NotCompiled("it does something else at every call")
            self._sights.count(where)
            layout = Layout(state, phi, Form(batch, tensors))
            graphs = self._graphs[where, present] = Graphs(sight, layout, optimizer)
        return Plan(graphs, step.eager, functional, tensors, step.known, made_of.held, graphs.layout)

    def judged(self, step: CompiledStep, batch: Batch) -> Judged | None:
        """Return the outer loss on a batch as a part of a graph, ``None`` where it is none."""
        if self._refusals.holds("outer"):
            return None
        try:
            made_of = fingerprint(step.problem, "outer_loss")
        except NotCompiled:  # of this strategy
            return None
        if made_of.held:
            return None
        try:
            sight, flat = self._sights.of(made_of, step.problem.stacked, batch, "outer")
            key = made_of.key, flat.rest, sight.look(made_of.functional)
        except NotCompiled as error:
            self._refusals.refuse("outer", error)
            return None
        return Judged(key, sight, Form(batch, flat.tensors), [tensor.detach().contiguous() for tensor in flat.tensors])

    def say(self, words: str) -> None:
        """Say something once that costs no more than time."""
        if words not in self._said:
            self._said.add(words)
            rank_zero_info(words)

    @staticmethod
    def _present(sight: Sight, functional: FunctionalModule, optimizer: InnerOptimizer) -> Hashable:
        update = sight.look_at_update(functional, FIRST) if takes_number(optimizer) else 0
        return sight.look(functional), type(optimizer), update
