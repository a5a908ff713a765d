"""The graphs of a stretch of inner steps, for one kind of batch and one state of the user's Python.

A graph takes, in this order: the number of steps before (where it is an input), θ and optimizer state, φ, buffers, the
tensors of the inner batches, those of an outer batch, then cotangents or tangents and directions, and last what the
losses read besides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import append_loss
from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.compiled.beside import Beside, taken_apart
from lightning_bilevel.compiled.factored import factored
from lightning_bilevel.compiled.forked import compiled_forks
from lightning_bilevel.compiled.graphs import Backend, Call, Traced, compiled, trace
from lightning_bilevel.compiled.left import (
    Left,
    Log,
    Spot,
    Taken,
    tensors_of,
)
from lightning_bilevel.compiled.passes import cut
from lightning_bilevel.compiled.simplified import simplified
from lightning_bilevel.compiled.watch import Level, Place
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.metrics import Later, State
from lightning_bilevel.modules.recorder import LogRecorder, primal
from lightning_bilevel.problem import Batch, InnerState
from lightning_bilevel.randomness import RngState
from lightning_bilevel.stacking import replaced
from lightning_bilevel.tree import Params


class Part(NamedTuple):
    """One of the functions of a step, compiled.

    Attributes:
        outputs: how many tensors it returns first: the state, buffers, the loss, what metrics get and what is logged.
        told: what the inner loss leaves.
        call: the graph; of a step that can be run backward, the first half: (step, kept).
        places: where it finds what the losses read besides its arguments.
        numbered: whether the number of steps before is its first argument.
        back: the second half: (arguments, kept, cotangents) to the gradients.
        live: which outer parameters there is a gradient for.
        left: what an outer loss at the end leaves.
    """

    outputs: int
    told: Left
    call: Call
    places: list[Place]
    numbered: bool
    back: Call | None = None
    live: tuple[bool, ...] = ()
    left: Left = Left()

    def __call__(self, steps: int, args: list[Tensor]) -> Sequence[Tensor]:
        """Return what the graph returns."""
        return self.call([*self._first(steps, args), *args, *read(self.places)])

    def backward(self, steps: int, args: list[Tensor], kept: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        """Return the gradients, zeros left out where nothing depends on an outer parameter."""
        assert self.back is not None
        return list(self.back([*self._first(steps, args), *args, *kept, *cotangents, *read(self.places)]))

    def tell(self, results: Sequence[Tensor], functional: FunctionalModule) -> None:
        """Log what the inner loss logs, and call its metrics."""
        self.told.tell_last(results[: self.outputs], functional)

    def _first(self, steps: int, args: list[Tensor]) -> list[Tensor]:
        return [_number(steps, args[0])] if self.numbered else []


def read(places: Sequence[Place]) -> list[Tensor]:
    """Return what stands at places now."""
    return [place.value() for place in places]


def _number(steps: int, beside: Tensor) -> Tensor:
    """Return the number of steps before; on a GPU with all else, for a CUDA graph reads nothing from elsewhere."""
    return torch.full((), float(steps), dtype=torch.float64, device=beside.device if beside.is_cuda else "cpu")


class Form:
    """A batch without its tensors.

    Args:
        batch: all but its tensors' numbers counts.
        tensors: those of the batch, and those that a strategy's own loss holds.

    Attributes:
        count: how many tensors there are.
    """

    def __init__(self, batch: Batch, tensors: Sequence[Tensor]) -> None:
        nothing = torch.empty(0)
        self.count, self._batch = len(tensors), replaced(batch, lambda _: nothing)

    def filled(self, tensors: Iterator[Tensor]) -> Batch:
        """Return the batch with the next of these tensors."""
        own = iter([next(tensors) for _ in range(self.count)])
        return replaced(self._batch, lambda _: next(own))


ONE = (0,)
"""The order of a stretch of one step."""


class Layout:
    """Names and counts of what graphs take and return.

    Args:
        state: an inner state; only its names are kept.
        phi: outer parameters, likewise.
        form: that of the inner batches.

    Attributes:
        order: of each step of a stretch, which of its batches it takes.
        judge: the form of the outer batch, where a graph takes one.
        tied: names of what starts as φ, which is no argument.
        after: how many steps are taken where the outer loss is evaluated and weighed; empty: it is at the end alone.
    """

    def __init__(self, state: InnerState, phi: Params, form: Form) -> None:
        nothing = torch.empty(0)
        self.names, self.outer, self.buffers = list(state.flat()), list(phi), list(state.buffers)
        self.order: tuple[int, ...] = ONE
        self.judge: Form | None = None
        self.tied: tuple[str, ...] = ()
        self.after: tuple[int, ...] = ()
        self._template, self._form = state.map(lambda _: nothing), form
        self._shapes = {name: value.shape for name, value in state.flat().items()}

    def over(
        self,
        order: tuple[int, ...],
        judge: Form | None = None,
        tied: tuple[str, ...] = (),
        after: tuple[int, ...] = (),
    ) -> Layout:
        """Return the layout of a stretch of steps, and of an outer loss at its end, or on the way."""
        layout = copy.copy(self)
        layout.order, layout.judge, layout.tied, layout.after = order, judge, tied, after
        return layout

    @property
    def own(self) -> list[str]:
        """The names of the state before that are arguments."""
        return [name for name in self.names if name not in self.tied]

    @property
    def outputs(self) -> int:
        """How many tensors a stretch returns: the state, buffers and the losses."""
        return len(self.names) + len(self.buffers) + 1

    @property
    def inputs(self) -> int:
        """How many tensors a stretch takes, but for the number of steps before."""
        batches = self._form.count * (max(self.order) + 1) + (0 if self.judge is None else self.judge.count)
        return len(self.own) + len(self.outer) + len(self.buffers) + batches

    def opened(self, args: list[Tensor], steps: int | Tensor) -> Opened:
        """Return what the arguments are."""
        values = iter(args)
        flat, phi, buffers = ({name: next(values) for name in each} for each in (self.own, self.outer, self.buffers))
        flat = self.completed(flat, phi)
        batches = [self._form.filled(values) for _ in range(max(self.order) + 1)]
        judge = None if self.judge is None else self.judge.filled(values)
        return Opened(self.state(flat, buffers, steps), phi, [batches[n] for n in self.order], judge, list(values))

    def completed(self, flat: Params, phi: Params) -> Params:
        """Return the state before, in order, with what is tied to φ."""
        return {n: phi[n].expand(self._shapes[n]) if n in self.tied else flat[n] for n in self.names}

    def state(self, flat: Params, buffers: Params, steps: int | Tensor) -> InnerState:
        """Return the state with these tensors."""
        before = self._template.unflat(flat)
        return InnerState(before.params, buffers, before.opt_state, steps)  # type: ignore[arg-type]


class Opened(NamedTuple):
    """What the arguments of a graph are: the state before a stretch, φ, the batches, and the rest."""

    state: InnerState
    phi: Params
    batches: list[Batch]
    judge: Batch
    rest: list[Tensor]


Function = Callable[[list[Tensor], "int | Tensor"], list[Tensor | None]]


class Functions:
    """What is traced: the functions of a stretch of steps, of lists of tensors.

    Args:
        step: whose functions these are.
        layout: names the tensors.
        recorder: of what the losses log.

    Attributes:
        spots: what the losses left at the last call, and where that is among the outputs.
        counts: whether metrics are called: while a loss is traced, they are not.
        seen: what the losses logged, and what metrics had counted then.
    """

    def __init__(self, step: GradientStep, layout: Layout, recorder: LogRecorder) -> None:
        self.step, self.layout, self._recorder = step, layout, recorder
        self.spots: dict[Level, Spot] = {}
        self.counts, self.seen = False, dict[Level, tuple[Log, State]]()

    @property
    def outputs(self) -> int:
        """How many tensors a function returns before its derivatives, by the last call."""
        return self.layout.outputs + self.left("inner").total

    def left(self, level: Level) -> Left:
        """Return what a loss left at the last call."""
        return self.spots[level].left if level in self.spots else Left()

    def is_aside(self, number: int) -> bool:
        """Return whether an output is what a loss returns beside its value, or gives to a metric."""
        return any(number in spot.aside for spot in self.spots.values())

    def described(self, number: int) -> str:
        """Return what an output is."""
        names = [*self.layout.names, *self.layout.buffers]
        if self.is_aside(number):
            return BESIDE
        if number < len(names):
            return f"`{names[number]}` after a step"
        if number < self.outputs:
            return "the inner loss" if number == len(names) else "what the loss logs"
        return f"derivative {number - self.outputs} of a step"

    def take(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the steps."""
        state, phi, batches, *_ = self.layout.opened(args, steps)
        losses: list[Tensor] = []
        with self._logging() as logged:
            for batch in batches:
                state, loss = self.step(state, phi, batch)
                append_loss(losses, loss)
        return self._ended(state, losses, logged)

    def pull(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the steps; return the gradient of ⟨cotangent, end⟩ by state and φ as well."""
        before, phi, batches, _, cotangents = self.layout.opened(args, steps)
        begin, outer = tree.leaves(before.flat()), tree.leaves(phi)
        with self._logging() as logged:
            after, losses = self.step.graph(self.layout.state(begin, before.buffers, steps), outer, batches)
        pairs = [(end, d) for end, d in zip(after.flat().values(), cotangents, strict=True) if end.requires_grad]
        inputs = [*begin.values(), *outer.values()]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs:
            ends, vectors = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, inputs, vectors, allow_unused=True)
        return [*self._ended(after, losses, logged), *_gradients(begin, found)]

    def push(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the steps and push tangents of the state along directions."""
        state, phi, batches, _, rest = self.layout.opened(args, steps)
        n = len(self.layout.names)
        tangents = dict(zip(self.layout.names, rest[:n], strict=True))
        directions = dict(zip(self.layout.outer, rest[n:], strict=True))
        losses: list[Tensor] = []
        with self._logging() as logged:
            for batch in batches:
                state, loss, tangents = self.step.jvp(state, phi, batch, tangents, directions)
                append_loss(losses, loss)
        return [*self._ended(state, losses, logged), *(tangents[name].contiguous() for name in self.layout.names)]

    def rule(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take a step; return the gradients of ⟨cotangent, θ⟩ through the optimizer's rule alone, by ∇g, θ and φ."""
        before, phi, (batch,), _, cotangents = self.layout.opened(args, steps)
        with self._logging() as logged:
            after, loss, pull = self.step.rule(before, phi, batch)
        found = pull(dict(zip(before.params, cotangents, strict=True)))
        return [*self._ended(after, [loss], logged), *(g.contiguous() for each in found for g in each.values())]

    def update(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the inner optimizer's step on θ for a gradient."""
        before, phi, *_ = self.layout.opened(args, steps)
        params, opt_state = self.step.problem.update(before.params, before.params, before.opt_state, phi, steps + 1)  # type: ignore[arg-type]
        return list(InnerState(params, opt_state=opt_state).flat().values())

    def whole(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the steps; return the outer loss at their end, the buffers it leaves, and its gradient as well.

        Where it is weighed on the way: all of its values, and the gradient of their weighed sum. What it draws is put
        back there, see :mod:`~lightning_bilevel.compiled.forked`.
        """
        before, phi, batches, judge, weights = self.layout.opened(args, steps)
        outer, flat = tree.leaves(phi), before.flat()
        begin = tree.leaves({name: flat[name] for name in self.layout.own})
        with torch.enable_grad():
            state = self.layout.state(self.layout.completed(begin, outer), before.buffers, steps)
        losses, values = list[Tensor](), list[Tensor]()
        for first, last in pairwise((0, *(self.layout.after or (len(batches),)))):
            with self._logging() as logged:
                state, more = self.step.graph(state, outer, batches[first:last])
            losses += more
            fork = RngState(losses[0].device).fork() if weights else nullcontext()
            with self._logging("outer") as of_outer, torch.enable_grad(), fork:
                values.append(self.step.problem.outer_loss(state.params, outer, judge, state.buffers))
                left, beside = self._recorder.left()
        ended = self._ended(state, losses, logged)
        form, aside = taken_apart(beside)
        aside, logs = [each.contiguous() for each in aside + of_outer.tensors], tensors_of(of_outer.log)
        with torch.enable_grad():
            value = torch.stack(values) if weights else values[0]
            total = (value * weights[0].to(value)).sum() if weights else value
        inputs = [*begin.values(), *outer.values()]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if total.requires_grad:
            found = torch.autograd.grad(total, inputs, allow_unused=True)
        there = [value.detach(), *(left[name] for name in self.layout.buffers)]
        earlier = [*ended, *there]
        self.spots["outer"] = Spot(of_outer.left(form), after(earlier, aside), after([*earlier, *aside], logs))
        return [*ended, *there, *aside, *logs, *_gradients(begin, found)]

    @contextmanager
    def _logging(self, level: Level = "inner") -> Iterator[Taken]:
        """Evaluate losses whose logs and calls of metrics are taken."""
        taken = Taken(self._recorder, level == "outer")

        def log(name: str | Later, value: Any, *args: Any, **kwargs: Any) -> None:
            taken.log[name.number if isinstance(name, Later) else name] = primal(value), args, kwargs

        with self._recorder.apart(log, None if self.counts else taken.instead):
            yield taken
            self.seen[level] = taken.log, self._recorder.counted

    def _ended(self, end: InnerState, losses: list[Tensor], taken: Taken) -> list[Tensor | None]:
        """Return the state after the steps, the losses, what metrics get and what is logged."""
        values = [value.detach().contiguous() for value in (*end.flat().values(), *end.buffers.values())]
        values.append(torch.cat([loss.reshape(-1) for loss in losses]))
        return [*values, *self._told(values, taken)]

    def _told(self, first: Sequence[Tensor], taken: Taken) -> list[Tensor]:
        """Return what the inner loss leaves, which comes after other outputs."""
        aside, logs = [tensor.contiguous() for tensor in taken.tensors], tensors_of(taken.log)
        self.spots["inner"] = Spot(taken.left(Beside()), after(first, aside), after([*first, *aside], logs))
        return [*aside, *logs]


BESIDE = "what a loss returns beside its value, or gives to a metric,"


def after(first: Sequence[Any], others: Sequence[Any]) -> range:
    """Return the numbers of the second of two lists that follow each other."""
    return range(len(first), len(first) + len(others))


def _gradients(begin: Params, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients by the state, zeros where there are none, and those by φ, ``None`` where there are none."""
    each = [*tree.like(begin, found[: len(begin)]).values(), *found[len(begin) :]]
    return [None if g is None else g.detach().contiguous() for g in each]


IN_HALVES = {"pull", "rule"}
"""The functions whose second half is given what their first half has led to."""


def made(
    functions: Functions,
    name: str,
    args: list[Tensor],
    steps: int | None,
    backend: Backend,
    places: Callable[[Traced], list[Place]],
) -> Part:
    """Trace and compile one of the functions.

    Args:
        functions: those of a step.
        name: of the function, ``"take"``, ``"pull"``, ``"rule"``, ``"push"`` or ``"whole"``.
        args: all that it takes, for their shapes.
        steps: before this one, as a part of the graph; ``None``: it is an input.
        backend: what compiles.
        places: where what the losses read is found; raises where that cannot be.

    Raises:
        NotCompiled: something cannot be traced or compiled.
    """
    function: Function = getattr(functions, name)
    traced = traced_at(function, args, steps)
    where, numbered = places(traced), steps is None
    graph = factored(simplified(traced.graph))
    first = [_number(0, args[0])] if numbered else []
    layout, outputs, told = functions.layout, functions.outputs, functions.left("inner")
    live = tuple(traced.present[-len(layout.outer) :])
    if name not in IN_HALVES:
        call = compiled_forks(graph, [*first, *args, *traced.read], backend, traced.forks)
        return Part(outputs, told, call, where, numbered, live=live, left=functions.left("outer"))
    inputs = len(first) + layout.inputs
    halves = cut(graph, inputs, outputs, len(traced.read))
    own, cotangents = [*first, *args[: layout.inputs]], args[layout.inputs :]
    forward = compiled_forks(halves.forward, [*own, *traced.read], backend, traced.forks)
    kept = list(forward([*own, *traced.read]))[outputs:]
    back = compiled(halves.backward, [*own, *kept, *cotangents, *traced.read], backend)
    return Part(outputs, told, forward, where, numbered, back, live)


def traced_at(function: Function, args: list[Tensor], steps: int | None) -> Traced:
    """Trace a function at a number of steps, or with it as its first argument where that is ``None``."""
    if steps is not None:
        return trace(lambda inputs: function(inputs, steps), args)
    return trace(lambda inputs: function(inputs[1:], inputs[0]), [_number(0, args[0]), *args])
