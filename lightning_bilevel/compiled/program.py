"""The graphs of one inner step, for one kind of batch and one state of the user's Python.

A graph takes, in this order: the number of steps before (where it is an input), θ and optimizer state, φ, buffers, the
tensors of the batch, then cotangents or tangents and directions, and last what the losses read besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bilevel import tree
from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.compiled.graphs import Backend, Call, Traced, compiled, trace
from lightning_bilevel.compiled.passes import cut
from lightning_bilevel.compiled.watch import Place
from lightning_bilevel.modules.recorder import LogRecorder, primal
from lightning_bilevel.problem import Batch, InnerState
from lightning_bilevel.stacking import replaced
from lightning_bilevel.tree import Params


class Logged(NamedTuple):
    """What a loss logs, ``self.log(name, value, *args, **kwargs)``; ``value`` is ``None`` for an output of a graph."""

    name: str
    value: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Part(NamedTuple):
    """One of the functions of a step, compiled.

    Attributes:
        outputs: how many tensors it returns first: the state, buffers, the loss and what is logged.
        logged: what is logged.
        call: the graph; of a step that can be run backward, the first half: (step, kept).
        places: where it finds what the losses read besides its arguments.
        numbered: whether the number of steps before is its first argument.
        back: the second half: (arguments, kept, cotangents) to the gradients.
        live: of the second half, which outer parameters there is a gradient for.
    """

    outputs: int
    logged: list[Logged]
    call: Call
    places: list[Place]
    numbered: bool
    back: Call | None = None
    live: tuple[bool, ...] = ()

    def __call__(self, steps: int, args: list[Tensor]) -> Sequence[Tensor]:
        """Return what the graph returns."""
        return self.call([*self._first(steps), *args, *self._read()])

    def backward(self, steps: int, args: list[Tensor], kept: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        """Return the gradients, zeros left out where nothing depends on an outer parameter."""
        assert self.back is not None
        return list(self.back([*self._first(steps), *args, *kept, *cotangents, *self._read()]))

    def log(self, results: Sequence[Tensor], log: Callable[..., None]) -> None:
        """Log what the loss logs."""
        values = iter(results[self.outputs - sum(each.value is None for each in self.logged) : self.outputs])
        for name, value, args, kwargs in self.logged:
            log(name, next(values) if value is None else value, *args, **kwargs)

    def _first(self, steps: int) -> list[Tensor]:
        return [torch.tensor(float(steps), dtype=torch.float64)] if self.numbered else []

    def _read(self) -> list[Tensor]:
        return [place.value() for place in self.places]


class Layout:
    """Names and counts of what graphs take and return.

    Args:
        state: an inner state; only its names are kept.
        phi: outer parameters, likewise.
        batch: a batch; all but its tensors' numbers counts.
        tensors: those of the batch.
    """

    def __init__(self, state: InnerState, phi: Params, batch: Batch, tensors: Sequence[Tensor]) -> None:
        nothing = torch.empty(0)
        self.names, self.outer, self.buffers = list(state.flat()), list(phi), list(state.buffers)
        self._template = state.map(lambda _: nothing)
        self._batch = replaced(batch, lambda _: nothing)
        self._count = len(tensors)

    @property
    def outputs(self) -> int:
        """How many tensors a step returns: the state, buffers and the loss."""
        return len(self.names) + len(self.buffers) + 1

    @property
    def inputs(self) -> int:
        """How many tensors a step takes, but for the number of steps before."""
        return len(self.names) + len(self.outer) + len(self.buffers) + self._count

    def opened(self, args: list[Tensor], steps: int | Tensor) -> tuple[InnerState, Params, Batch, list[Tensor]]:
        """Return the state, φ, the batch, and the rest."""
        n, m = len(self.names), len(self.outer)
        flat = dict(zip(self.names, args[:n], strict=True))
        phi = dict(zip(self.outer, args[n : n + m], strict=True))
        args = args[n + m :]
        buffers = dict(zip(self.buffers, args[: len(self.buffers)], strict=True))
        tensors = iter(args[len(self.buffers) : len(self.buffers) + self._count])
        batch = replaced(self._batch, lambda _: next(tensors))
        return self.state(flat, buffers, steps), phi, batch, args[len(self.buffers) + self._count :]

    def state(self, flat: Params, buffers: Params, steps: int | Tensor) -> InnerState:
        """Return the state with these tensors."""
        before = self._template.unflat(flat)
        return InnerState(before.params, buffers, before.opt_state, steps)  # type: ignore[arg-type]


Function = Callable[[list[Tensor], "int | Tensor"], list[Tensor | None]]


class Functions:
    """What is traced: the functions of a step, of lists of tensors.

    Args:
        step: whose functions these are.
        layout: names the tensors.
        recorder: of what the losses log.

    Attributes:
        logged: what the loss logged at the last call.
    """

    def __init__(self, step: GradientStep, layout: Layout, recorder: LogRecorder) -> None:
        self.step, self.layout, self._recorder = step, layout, recorder
        self._log: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    @property
    def logged(self) -> list[Logged]:
        """What the loss logged at the last call."""
        return [
            Logged(name, None if isinstance(value, Tensor) else value, args, kwargs)
            for name, (value, args, kwargs) in self._log.items()
        ]

    @property
    def outputs(self) -> int:
        """How many tensors a function returns before its derivatives, by the last call."""
        return self.layout.outputs + sum(each.value is None for each in self.logged)

    def described(self, number: int) -> str:
        """Return what an output is."""
        names = [*self.layout.names, *self.layout.buffers]
        if number < len(names):
            return f"`{names[number]}` after a step"
        if number < self.outputs:
            return "the inner loss" if number == len(names) else "what the loss logs"
        return f"derivative {number - self.outputs} of a step"

    def take(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the step."""
        before, phi, batch, _ = self.layout.opened(args, steps)
        with self._logging():
            after, loss = self.step(before, phi, batch)
        return self._ended(after, loss)

    def pull(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the step; return the gradient of ⟨cotangent, step⟩ by state and φ as well."""
        before, phi, batch, cotangents = self.layout.opened(args, steps)
        begin, outer = tree.leaves(before.flat()), tree.leaves(phi)
        with self._logging():
            after, (loss,) = self.step.graph(self.layout.state(begin, before.buffers, steps), outer, [batch])
        pairs = [(end, d) for end, d in zip(after.flat().values(), cotangents, strict=True) if end.requires_grad]
        inputs = [*begin.values(), *outer.values()]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs:
            ends, vectors = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, inputs, vectors, allow_unused=True)
        gradients = [*tree.like(begin, found[: len(begin)]).values(), *found[len(begin) :]]
        return [*self._ended(after, loss), *(None if g is None else g.detach().contiguous() for g in gradients)]

    def push(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the step and push tangents of the state along directions."""
        before, phi, batch, rest = self.layout.opened(args, steps)
        n = len(self.layout.names)
        tangents = dict(zip(self.layout.names, rest[:n], strict=True))
        directions = dict(zip(self.layout.outer, rest[n:], strict=True))
        with self._logging():
            after, loss, pushed = self.step.jvp(before, phi, batch, tangents, directions)
        assert loss is not None
        return [*self._ended(after, loss), *(pushed[name].contiguous() for name in self.layout.names)]

    def update(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Take the inner optimizer's step on θ for a gradient."""
        before, phi, _, _ = self.layout.opened(args, steps)
        params, opt_state = self.step.problem.update(before.params, before.params, before.opt_state, phi, steps + 1)  # type: ignore[arg-type]
        return list(InnerState(params, opt_state=opt_state).flat().values())

    @contextmanager
    def _logging(self) -> Iterator[None]:
        self._log = {}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            self._log[name] = primal(value), args, kwargs

        with self._recorder.apart(log):
            yield

    def _ended(self, after: InnerState, loss: Tensor) -> list[Tensor | None]:
        """Return the state after a step, the loss, and what is logged."""
        values = [value.detach().contiguous() for value in (*after.flat().values(), *after.buffers.values())]
        logged = [value.detach() for value, _, _ in self._log.values() if isinstance(value, Tensor)]
        return [*values, loss.reshape(()), *logged]


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
        name: of the function, ``"take"``, ``"pull"`` or ``"push"``.
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
    first = [torch.zeros((), dtype=torch.float64)] if numbered else []
    if name != "pull":
        call = compiled(traced.graph, [*first, *args, *traced.read], backend)
        return Part(functions.outputs, functions.logged, call, where, numbered)
    layout, outputs = functions.layout, functions.outputs
    inputs = len(first) + layout.inputs
    halves = cut(traced.graph, inputs, outputs, len(traced.read))
    own, cotangents = [*first, *args[: layout.inputs]], args[layout.inputs :]
    forward = compiled(halves.forward, [*own, *traced.read], backend)
    kept = list(forward([*own, *traced.read]))[outputs:]
    back = compiled(halves.backward, [*own, *kept, *cotangents, *traced.read], backend)
    live = tuple(traced.present[outputs + len(layout.names) :])
    return Part(outputs, functions.logged, forward, where, numbered, back, live)


def traced_at(function: Function, args: list[Tensor], steps: int | None) -> Traced:
    """Trace a function at a number of steps, or with it as its first argument where that is ``None``."""
    if steps is not None:
        return trace(lambda inputs: function(inputs, steps), args)
    number = torch.zeros((), dtype=torch.float64)
    return trace(lambda inputs: function(inputs[1:], inputs[0]), [number, *args])
