"""Graphs of the losses at a state: values, gradients, and products with the second derivatives of the inner loss.

A graph takes, in this order: θ, φ, buffers, the tensors of the batch, then vectors, and last what the losses read
besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, fx

from lightning_bilevel import tree
from lightning_bilevel.calculus.base import Condition
from lightning_bilevel.calculus.inner import inner_value_and_grads
from lightning_bilevel.calculus.outer import outer_value, outer_value_and_grads
from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.compiled.beside import taken_apart
from lightning_bilevel.compiled.forked import compiled_forks
from lightning_bilevel.compiled.graphs import Backend, Call, Traced, compiled
from lightning_bilevel.compiled.left import Left, Spot, Taken, count_of, tensors_of
from lightning_bilevel.compiled.passes import cut, taken
from lightning_bilevel.compiled.program import (
    BESIDE,
    Functions,
    Layout,
    after,
    read,
    traced_at,
)
from lightning_bilevel.compiled.series import written_out
from lightning_bilevel.compiled.watch import Place
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.modules.recorder import LogRecorder
from lightning_bilevel.problem import BilevelProblem, Episode


class Evaluations(Functions):
    """What is traced: values and derivatives of a problem's losses, of lists of tensors.

    Each returns what comes first, then what the loss logs, then what a second half may compute from vectors.

    Args:
        problem: whose losses these are.
        layout: names the tensors.
        recorder: of what the losses log.
    """

    def __init__(self, problem: BilevelProblem, layout: Layout, recorder: LogRecorder) -> None:
        self.problem = replace(problem, compiler=None, observer=None)
        super().__init__(GradientStep(self.problem), layout, recorder)
        self._outputs = 0

    @property
    def outputs(self) -> int:
        """How many tensors come first, with what is logged, by the last call."""
        return self._outputs

    def described(self, number: int) -> str:
        """Return what an output is."""
        return BESIDE if self.is_aside(number) else f"output {number} of the losses and their derivatives"

    def outer(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Return f, the buffers that it leaves and what it returns beside its value."""
        state, phi, (batch,), *_ = self.layout.opened(args, steps)
        with self._logging("outer") as taken:
            value, _ = outer_value(self.problem, state, phi, Episode([], batch))
            buffers, beside = self._recorder.left()
        return self._judged(value, buffers, beside, taken, [])

    def outer_slopes(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Return f, the buffers that it leaves, what it returns beside its value, ∂f/∂θ and ∂f/∂φ."""
        state, phi, (batch,), *_ = self.layout.opened(args, steps)
        with self._logging("outer") as taken:
            value, d, c, _ = outer_value_and_grads(self.problem, state, phi, Episode([], batch))
            buffers, beside = self._recorder.left()
        return self._judged(value, buffers, beside, taken, [*d.values(), *c.values()])

    def inner_slopes(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Return g, ∂g/∂θ and ∂g/∂φ."""
        return self._inner_slopes(args, steps, by_theta=True)

    def inner_slopes_by_phi(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Return g and ∂g/∂φ."""
        return self._inner_slopes(args, steps, by_theta=False)

    def curvature(self, args: list[Tensor], steps: int | Tensor) -> list[Tensor | None]:
        """Return ∂g/∂θ; then ∂²g/∂θ² v and v ∂²g/∂θ∂φ."""
        condition, vector, taken = self._condition(args, steps)
        first = self._found(list(condition.residual.values()), taken)
        return [*first, *condition.transposed(vector).values(), *condition.mixed(vector).values()]

    def _condition(self, args: list[Tensor], steps: int | Tensor) -> tuple[Condition, tree.Params, Taken]:
        state, phi, (batch,), _, vectors = self.layout.opened(args, steps)
        with self._logging() as taken:
            condition = self.step.stationarity(state, phi, batch)
        return condition, dict(zip(self.layout.names, vectors, strict=True)), taken

    def _inner_slopes(self, args: list[Tensor], steps: int | Tensor, by_theta: bool) -> list[Tensor | None]:
        state, phi, (batch,), *_ = self.layout.opened(args, steps)
        with self._logging() as taken:
            value, d, c = inner_value_and_grads(self.problem, state, phi, [batch], by_theta)
        return self._found([value, *d.values(), *c.values()], taken)

    def _judged(
        self, value: Tensor, left: tree.Params, beside: Mapping[str, Any], taken: Taken, slopes: list[Tensor]
    ) -> list[Tensor | None]:
        """Return f, what it leaves, its slopes, and what is logged."""
        form, tensors = taken_apart(beside)
        first = [value, *(left[name] for name in self.layout.buffers)]
        aside, logs = tensors + taken.tensors, tensors_of(taken.log)
        values = [each.detach().contiguous() for each in (*first, *aside, *slopes)]
        self.spots["outer"] = Spot(taken.left(form), after(first, aside), after(values, logs))
        self._outputs = len(values) + len(logs)
        return [*values, *logs]

    def _found(self, values: list[Tensor], taken: Taken) -> list[Tensor | None]:
        """Return values, and what the inner loss leaves."""
        first = [value.detach().contiguous() for value in values]
        left = self._told(first, taken)
        self._outputs = len(first) + len(left)
        return [*first, *left]


class Evaluation(NamedTuple):
    """A graph of the losses at a state.

    Attributes:
        outputs: how many tensors it returns first: what is asked for, and what the loss leaves.
        told: what the inner loss leaves.
        call: the graph; it also returns what later ones are given.
        places: where it finds what the losses read besides its arguments.
        own: how many arguments it takes, but for vectors.
        later: the graphs of (arguments, kept, vectors) to products; none of values and gradients.
        product_graph: the first of these, not compiled.
        series: graphs of several terms of a series, by their number and α; ``None``: there is none.
        backend: what compiles.
        left: what an outer loss leaves.
    """

    outputs: int
    told: Left
    call: Call
    places: list[Place]
    own: int
    later: tuple[Call, ...] = ()
    product_graph: fx.GraphModule | None = None
    series: dict[tuple[int, float], Call | None] = {}  # noqa: RUF012  # each has its own
    backend: Backend = "flat"
    left: Left = Left()

    def __call__(self, args: list[Tensor]) -> list[Tensor]:
        """Return what the graph returns."""
        return list(self.call([*args, *read(self.places)]))

    @property
    def logs(self) -> int:
        """How many tensors the outer loss logs."""
        return count_of(self.left.logged)

    def all_of(self, args: list[Tensor]) -> list[Tensor]:
        """Return what the function returns that the graphs were made of, all products with the same vectors."""
        if not self.later:
            return self(args)
        own, vectors = args[: self.own], args[self.own :]
        results = self(own)
        first, kept = results[: self.outputs], results[self.outputs :]
        return first + [value for which in range(len(self.later)) for value in self.product(which, own, kept, vectors)]

    def product(self, which: int, args: list[Tensor], kept: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        """Return what one of the later graphs returns."""
        return list(self.later[which]([*args, *kept, *vectors, *read(self.places)]))

    def terms(
        self, count: int, step_size: float, args: list[Tensor], kept: list[Tensor], vectors: list[Tensor]
    ) -> list[Tensor] | None:
        """Return terms of the Neumann series of the first product, see :func:`written_out`."""
        given = [*args, *kept, *vectors, *read(self.places)]
        if (count, step_size) not in self.series:
            assert self.product_graph is not None
            first, n = len(args) + len(kept), len(vectors)
            self.series[count, step_size] = written_out(
                self.product_graph, given, first, n, count, step_size, self.backend
            )
        call = self.series[count, step_size]
        return None if call is None else list(call(given))

    def tell(self, results: Sequence[Tensor], functional: FunctionalModule) -> None:
        """Log what the inner loss logs, and call its metrics."""
        self.told.tell_last(results[: self.outputs], functional)


def evaluation(
    functions: Evaluations,
    name: str,
    args: list[Tensor],
    backend: Backend,
    places: Callable[[Traced], list[Place]],
) -> Evaluation:
    """Trace and compile one of the functions.

    Args:
        functions: those of a problem.
        name: of the function.
        args: all that it takes, for their shapes.
        backend: what compiles.
        places: where what the losses read is found; raises where that cannot be.

    Raises:
        NotCompiled: something cannot be traced or compiled.
    """
    traced = traced_at(getattr(functions, name), args, 0)
    where, own, told = places(traced), functions.layout.inputs, functions.left("inner")
    if len(args) == own:
        call = compiled_forks(traced.graph, [*args, *traced.read], backend, traced.forks)
        return Evaluation(functions.outputs, told, call, where, own, left=functions.left("outer"))
    outputs, names = functions.outputs, len(functions.layout.names)
    halves = cut(traced.graph, own, outputs, len(traced.read))
    forward = compiled_forks(halves.forward, [*args[:own], *traced.read], backend, traced.forks)
    kept = list(forward([*args[:own], *traced.read]))[outputs:]
    given = [*args[:own], *kept, *args[own:], *traced.read]
    parts = taken(halves.backward, range(names)), taken(halves.backward, range(names, len(traced.present) - outputs))
    later = tuple(compiled(part, given, backend) for part in parts)
    return Evaluation(outputs, told, forward, where, own, later, parts[0], {}, backend)
