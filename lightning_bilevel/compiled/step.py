"""An inner step whose graphs are compiled: a step in, the same functions out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import Condition, InnerStep, Pulled, Ruled, Whole, append_loss
from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.calculus.tangents import Pushed
from lightning_bilevel.compiled.plan import Plan, joined, shared_out
from lightning_bilevel.compiled.products import at_fixed_point
from lightning_bilevel.compiled.program import Layout, Part
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.compiled.whole import Judged, ended
from lightning_bilevel.problem import Batch, InnerState
from lightning_bilevel.tree import Params

MOST_DIRECTIONS = 64
"""Directions that one graph pushes tangents along, with operations of its own for each."""


class Planner(Protocol):
    """Finds graphs; see :class:`~lightning_bilevel.compiled.compiler.Compiler`."""

    def plan(self, step: CompiledStep, state: InnerState, phi: Params, batch: Batch) -> Plan | None:
        """Return the graphs for a batch; ``None`` where the step has to be eager."""

    def condition(self, step: CompiledStep, state: InnerState, phi: Params, batch: Batch) -> Condition | None:
        """Return the condition that ∇g is zero; ``None`` where it has to be eager."""

    def judged(self, step: CompiledStep, batch: Batch) -> Judged | None:
        """Return the outer loss on a batch as a part of a graph; ``None`` where it is none."""

    def refuse(self, error: NotCompiled) -> None:
        """Take no step by graphs any more."""

    def say(self, words: str) -> None:
        """Say something once that costs no more than time."""


class CompiledStep(InnerStep):
    """A step by compiled graphs where there are some, and by the step it was made from elsewhere.

    Several steps are one graph where they are small. Reverse mode keeps the state before each graph and what is heavy
    in it (matrix products, convolutions, random masks), and computes the rest again.

    Args:
        eager: the step, operation by operation.
        planner: finds the graphs.

    Attributes:
        eager: as given.
        known: what the watch said in this run of steps, see :class:`~lightning_bilevel.compiled.plan.Plan`.
    """

    def __init__(self, eager: GradientStep, planner: Planner) -> None:
        super().__init__(eager.problem)
        self.eager, self._planner = eager, planner
        self.known: dict[Hashable, int] = {}
        self._plans: dict[int, tuple[Batch, Plan | None]] = {}
        self._looked_at = -1

    def __call__(self, state: InnerState, phi: Params, batch: Batch) -> tuple[InnerState, Tensor]:
        """Take the step."""
        state, (loss,) = self.run(state, phi, [batch])
        return state, loss.reshape(())

    def run(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> tuple[InnerState, list[Tensor]]:
        """Take the steps."""
        with torch.no_grad():
            stretches = self._stretches("take", state, phi, batches)
        if stretches is None:
            return self.eager.run(state, phi, batches)
        losses = list[Tensor]()
        with torch.no_grad():
            for plan, part in stretches:
                results = part(state.steps, [*_flat(state, phi), *plan.tensors])
                state, loss = _ended(plan, part, state, results)
                append_loss(losses, loss)
        return state, losses

    def vjp(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> Pulled:
        """Take the steps, and run them backward one by one."""
        with torch.no_grad():
            stretches = self._stretches("pull", state, phi, batches)
            if stretches is not None:
                return self._pulled(state.detach(), phi, stretches)
        return self.eager.vjp(state, phi, batches)

    def _pulled(self, state: InnerState, phi: Params, stretches: list[tuple[Plan, Part]]) -> Pulled:
        tape, losses = _Tape(phi), list[Tensor]()
        for plan, part in stretches:
            args = [*_flat(state, phi), *plan.tensors]
            results = list(part(state.steps, args))
            tape.append(plan.layout, part, state.steps, args, results[part.outputs :])
            state, loss = _ended(plan, part, state, results)
            append_loss(losses, loss)
        return Pulled(state, losses, tape.pull)

    def graph(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> tuple[InnerState, list[Tensor]]:
        """Take the steps as one operation of autograd's, whose backward pass runs them backward."""
        if not all(self._plan(state, phi, batch) for batch in batches):
            return self.eager.graph(state, phi, batches)
        end: list[Pulled] = []
        flat = state.flat()
        values = _Stretch.apply(self, state, list(phi), batches, end, *flat.values(), *phi.values())
        after, losses, _ = end.pop()
        return after.unflat(dict(zip(flat, values, strict=True))), losses

    def jvp(self, state: InnerState, phi: Params, batch: Batch, tangents: Params, directions: Params) -> Pushed:
        """Take the step and push tangents."""
        state, (loss,), tangents = self.push(state, phi, [batch], tangents, directions)
        return Pushed(state, loss.reshape(()), tangents)

    def push(
        self, state: InnerState, phi: Params, batches: Sequence[Batch], tangents: Params, directions: Params
    ) -> tuple[InnerState, list[Tensor], Params]:
        """Take the steps and push tangents."""
        with torch.no_grad():
            along = [tangents[name].contiguous() for name in state.flat()]
            along += [directions[name].contiguous() for name in phi]
            few = len(along[-1]) <= MOST_DIRECTIONS
            stretches = self._stretches("push", state, phi, batches, along) if few else None
        if not few:
            self._planner.say(
                f"Tangents along {len(along[-1])} directions at once are not pushed by graphs, which take minutes to "
                f"compile: leave `chunk_size=None`, or set at most {MOST_DIRECTIONS}."
            )
        if stretches is None:
            return self.eager.push(state, phi, batches, tangents, directions)
        losses = list[Tensor]()
        with torch.no_grad():
            v = [directions[name].contiguous() for name in phi]
            for plan, part in stretches:
                z = [tangents[name].contiguous() for name in plan.layout.names]
                results = part(state.steps, [*_flat(state, phi), *plan.tensors, *z, *v])
                state, loss = _ended(plan, part, state, results)
                append_loss(losses, loss)
                tangents = dict(zip(plan.layout.names, results[part.outputs :], strict=True))
        return state, losses, tangents

    def whole(
        self,
        state: InnerState,
        phi: Params,
        batches: Sequence[Batch],
        outer: Batch,
        tied: Collection[str] = (),
        weights: Mapping[int, Tensor] | None = None,
    ) -> Whole | None:
        """Take the steps, evaluate the outer loss and differentiate it in one graph, where all is small."""
        plans = self._same(state, phi, batches)
        if plans is None or not plans[0].graphs.whole:
            return None
        with torch.no_grad():
            if self._most("pull", plans, state, phi) < len(batches):
                return None
            if (judged := self._planner.judged(self, outer)) is None:
                return None
            plan = joined(plans).judged_by(judged, tuple(tied), tuple(weights or ()))
            args = [*_flat(state, phi, tied), *plan.tensors]
            if weights is not None:
                args.append(torch.stack([weight.detach() for weight in weights.values()]))
            try:
                part = plan.part("whole", state.steps, args)
            except NotCompiled as error:
                plan.graphs.whole = False
                self._planner.say(f"A run and its outer loss are not one graph: {error}.")
                return None
            results = part(state.steps, args)
            return ended(self.problem, plan.functional, plan.layout, part, state, phi, results)

    def fixed_point(self, state: InnerState, phi: Params, batch: Batch) -> Condition:
        """Take a step that can be run backward, any number of times, and return how far it goes."""
        if (found := self._halved("pull", state, phi, batch)) is None:
            return self.eager.fixed_point(state, phi, batch)
        after, _, part, backward = found
        return at_fixed_point(tree.sub(tree.detach(state.flat()), after.flat()), phi, part.live, backward)

    def rule(self, state: InnerState, phi: Params, batch: Batch) -> Ruled:
        """Take the step; its second half is the way back through the optimizer's rule."""
        if (found := self._halved("rule", state, phi, batch, tuple(state.params.values()))) is None:
            return self.eager.rule(state, phi, batch)
        after, loss, _, backward = found

        def pull(d: Params) -> tuple[Params, Params, Params]:
            with torch.no_grad():
                slopes = iter(backward([d[name].contiguous() for name in state.params]))
            u, by_theta, by_phi = ({name: next(slopes) for name in each} for each in (state.params, state.params, phi))
            return u, by_theta, by_phi

        return Ruled(after, loss.reshape(()), pull)

    def _halved(
        self, name: str, state: InnerState, phi: Params, batch: Batch, along: Sequence[Tensor] = ()
    ) -> tuple[InnerState, Tensor, Part, Callable[[list[Tensor]], list[Tensor]]] | None:
        """Take a step; return the state after it, the loss, its graph, and the second half of that."""
        with torch.no_grad():
            stretches = self._stretches(name, state, phi, [batch], [value.detach().contiguous() for value in along])
            if stretches is None:
                return None
            ((plan, part),) = stretches
            args = [*_flat(state, phi), *plan.tensors]
            results = list(part(state.steps, args))
            after, loss = _ended(plan, part, state, results)
        kept = results[part.outputs :]
        return after, loss, part, lambda vectors: part.backward(state.steps, args, kept, vectors)

    def stationarity(self, state: InnerState, phi: Params, batch: Batch) -> Condition:
        """Return the condition by graphs of its own, of the inner loss alone."""
        found = self._planner.condition(self, state, phi, batch)
        return self.eager.stationarity(state, phi, batch) if found is None else found

    def _plan(self, state: InnerState, phi: Params, batch: Batch) -> Plan | None:
        """Return the graphs for a batch, looked up anew where an outer loss may have changed what they are."""
        last = next(iter(self._plans.values()), (None, None))[1]
        if last is not None and last.functional.recorder.outer_losses != self._looked_at:
            self._plans, self.known = {}, {}
        if id(batch) not in self._plans:
            plan = self._planner.plan(self, state, phi, batch)
            self._plans[id(batch)] = batch, plan
            self._looked_at = -1 if plan is None else plan.functional.recorder.outer_losses
        return self._plans[id(batch)][1]

    def _planned(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> list[Plan] | None:
        plans = [self._plan(state, phi, batch) for batch in batches]
        there = [plan for plan in plans if plan is not None]
        return there if len(there) == len(plans) else None

    def _same(self, state: InnerState, phi: Params, batches: Sequence[Batch]) -> list[Plan] | None:
        """Return the plans of steps that have the same graphs, ``None`` where they have not."""
        plans = self._planned(state, phi, batches)
        return plans if plans and all(plan.graphs is plans[0].graphs for plan in plans) else None

    def _stretches(
        self, name: str, state: InnerState, phi: Params, batches: Sequence[Batch], along: Sequence[Tensor] = ()
    ) -> list[tuple[Plan, Part]] | None:
        """Return what takes the steps, made at the state before the first; ``None`` where they have to be eager.

        Args:
            name: of the function.
            state: before the first step.
            phi: outer parameters.
            batches: one per step.
            along: what the function takes besides.
        """
        plans = self._planned(state, phi, batches)
        if plans is None:
            return None
        flat = _flat(state, phi)
        besides = flat[: len(plans[0].layout.names)] if name == "pull" else along
        found, steps = list[tuple[Plan, Part]](), state.steps
        for plan in self._joined(name, plans, state, phi, besides):
            try:
                found.append((plan, plan.part(name, steps, [*flat, *plan.tensors, *besides])))
            except NotCompiled as error:
                if len(plan.layout.order) == 1:
                    self._planner.refuse(error)
                    self._plans = {number: (batch, None) for number, (batch, _) in self._plans.items()}
                    return None
                plan.graphs.part_steps(name)
                self._planner.say(f"Inner steps are compiled one by one, for together they are not: {error}.")
                return self._stretches(name, state, phi, batches, along)
            steps += len(plan.layout.order)
        return found

    def _joined(
        self, name: str, plans: list[Plan], state: InnerState, phi: Params, besides: Sequence[Tensor]
    ) -> Iterator[Plan]:
        """Yield the plans of stretches."""
        for _, group in groupby(plans, key=lambda plan: id(plan.graphs)):
            same = list(group)
            most = self._most(name, same, state, phi, besides) if len(same) > 1 else 1
            for count in shared_out(len(same), most):
                yield joined(same[:count])
                del same[:count]

    @staticmethod
    def _most(
        name: str, plans: list[Plan], state: InnerState, phi: Params, besides: Sequence[Tensor] | None = None
    ) -> int:
        first, again = plans[0], all(plan is plans[0] for plan in plans)
        if (name, again) in first.graphs.most:
            return first.graphs.most[name, again]
        flat = _flat(state, phi)
        if besides is None:
            besides = flat[: len(first.layout.names)]
        return first.most(name, state.steps, [*flat, *first.tensors, *besides], again)


class _Tape:
    """Steps that were taken, to be run backward once."""

    def __init__(self, phi: Params) -> None:
        self._phi, self._steps = phi, list[tuple[Layout, Part, int, list[Tensor], list[Tensor]]]()

    def append(self, layout: Layout, part: Part, steps: int, args: list[Tensor], kept: list[Tensor]) -> None:
        """Add a step: what it was given, and what it keeps for the way back."""
        self._steps.append((layout, part, steps, args, kept))

    def pull(self, cotangent: Params, wanted: Collection[str]) -> tuple[Params, Params]:
        """Run the steps backward; see :data:`~lightning_bilevel.calculus.base.Pullback`."""
        through: dict[str, Tensor] = {}
        with torch.no_grad():
            while self._steps:
                layout, part, steps, args, kept = self._steps.pop()
                n = len(layout.names)
                vectors = [
                    cotangent[name].contiguous() if name in cotangent else torch.zeros_like(like)
                    for name, like in zip(layout.names, args[:n], strict=True)
                ]
                cotangent.clear()
                found = part.backward(steps, args, kept, vectors)
                cotangent = dict(zip(layout.names, found[:n], strict=True))
                rest = iter(found[n:])
                for name, live in zip(layout.outer, part.live, strict=True):
                    if live:
                        value = next(rest)
                        through[name] = through[name] + value if name in through else value
        total = {name: through[name] if name in through else torch.zeros_like(p) for name, p in self._phi.items()}
        return {name: value for name, value in cotangent.items() if name in wanted}, total


class _Stretch(torch.autograd.Function):
    """Steps as one operation: (state, φ) to the state at their end."""

    @staticmethod
    def forward(
        ctx: Any,
        step: CompiledStep,
        state: InnerState,
        outer: list[str],
        batches: Sequence[Batch],
        end: list[Pulled],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        names = list(state.flat())
        detached = [tensor.detach() for tensor in tensors]
        before = state.unflat(dict(zip(names, detached, strict=False)))
        pulled = step.vjp(before, dict(zip(outer, detached[len(names) :], strict=True)), batches)
        ctx.pull, ctx.names, ctx.outer = pulled.pull, names, outer
        ctx.set_materialize_grads(False)
        end.append(pulled)
        return tuple(pulled.state.flat().values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        given = {name: d for name, d in zip(ctx.names, cotangents, strict=True) if d is not None}
        d, through = ctx.pull(given, ctx.names)
        found = [*(d.get(name) for name in ctx.names), *(through[name] for name in ctx.outer)]
        wanted = ctx.needs_input_grad[5:]
        return (*[None] * 5, *(value if asked else None for value, asked in zip(found, wanted, strict=True)))


def _flat(state: InnerState, phi: Params, tied: Collection[str] = ()) -> list[Tensor]:
    """Return what every graph takes first; without what is tied to φ."""
    own = state.flat().items()
    values = (*(value for name, value in own if name not in tied), *phi.values(), *state.buffers.values())
    return [value.detach().contiguous() for value in values]


def _ended(plan: Plan, part: Part, state: InnerState, results: Sequence[Tensor]) -> tuple[InnerState, Tensor]:
    """Return the state after a stretch, and the inner losses before each step; log what the loss logs."""
    part.tell(results, plan.functional)
    layout = plan.layout
    n, m = len(layout.names), layout.outputs - 1
    flat = dict(zip(layout.names, results[:n], strict=True))
    buffers = dict(zip(layout.buffers, results[n:m], strict=True))
    return layout.state(flat, buffers, state.steps + len(layout.order)), results[m]
