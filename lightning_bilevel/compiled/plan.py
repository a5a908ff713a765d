"""The graphs that were made for one kind of batch, and which of them a stretch of steps takes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.compiled.agree import agree, precision
from lightning_bilevel.compiled.counted import counted_alike
from lightning_bilevel.compiled.factored import WORTH, factored, operations
from lightning_bilevel.compiled.graphs import Traced, backend_for
from lightning_bilevel.compiled.making import made_once
from lightning_bilevel.compiled.program import IN_HALVES, ONE, Functions, Layout, Part, made, traced_at
from lightning_bilevel.compiled.reasons import NotCompiled, reason
from lightning_bilevel.compiled.sight import Sight
from lightning_bilevel.compiled.simplified import simplified
from lightning_bilevel.compiled.watch import Place
from lightning_bilevel.compiled.whole import Judged
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.inner_optimizers.base import is_ours
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer
from lightning_bilevel.modules.functional import FunctionalModule

MOST_UPDATES = 8
"""Different updates of the inner optimizer that are compiled; each takes as long as a step."""

MOST_NUMBERS = 64
"""Numbers of updates that are looked at to find these."""

MOST_NODES = 1_000
"""Operations of one graph that several steps share: compiling a hundred takes a second or two."""

MOST_NUMBERS_OF_A_STEP = 2**21
"""Numbers that a step may write for steps to share a graph: it takes a millisecond then, beside which starting a graph
is nothing."""

MOST_LARGE_STEPS = 3
"""Larger steps that share a graph because they have products in common. Data cleaning with a net 784-256-10 on 100
examples takes 45, 31 and 20 ms by graphs of 1, 2 and 5 of its 20 steps, and compiling them 36, 46 and 109 s."""

FIRST = 2
"""The update that is watched where its number is an input of the graphs."""


class Graphs:
    """The graphs for one kind of batch and one state of the user's Python.

    Args:
        sight: sees what changes.
        layout: names the tensors.
        optimizer: the inner optimizer.

    Attributes:
        sight: as given.
        layout: as given.
        numbered: whether the number of a step is an input of its graphs.
        parts: the graphs, by function, number and shapes.
        updates: the number of an update, and what the watch said of it, to which of the different ones it is.
        codes: what the different updates do, numbered.
        firsts: the number of an update of each kind, which its graphs are made for.
        most: how many steps one graph may hold, by function, and by whether all are on one batch.
        whole: whether a run and its outer loss may be one graph.
    """

    def __init__(self, sight: Sight, layout: Layout, optimizer: InnerOptimizer) -> None:
        self.sight, self.layout = sight, layout
        self.numbered = takes_number(optimizer)
        self.parts: dict[Hashable, Part] = {}
        self.updates: dict[Hashable, int] = {}
        self.codes: dict[Hashable, int] = {}
        self.firsts: dict[int, int] = {}
        self.most: dict[tuple[str, bool], int] = {}
        self.whole = True

    def part_steps(self, name: str) -> None:
        """Let each graph of a function hold one step."""
        self.most |= {(name, again): 1 for again in (False, True)}


def takes_number(optimizer: InnerOptimizer) -> bool:
    """Return whether an update's number may be a tensor, which a rule of the user's may take for another thing."""
    return is_ours(optimizer) and isinstance(optimizer, ElementwiseOptimizer) and not optimizer.per_step


class Plan(NamedTuple):
    """The graphs for a stretch of steps, in the estimate that runs.

    Attributes:
        graphs: those that hold now.
        step: the eager step.
        functional: the module.
        tensors: those of the batches, each followed by those that a strategy's own loss holds.
        known: what the watch said in this run of steps, by number of update.
        held: what a strategy's own loss holds.
        layout: how the graphs name their tensors.
        judged: the outer loss at the end, where it is in the graph.
    """

    graphs: Graphs
    step: GradientStep
    functional: FunctionalModule
    tensors: list[Tensor]
    known: dict[Hashable, int]
    held: list[Tensor]
    layout: Layout
    judged: Judged | None = None

    def judged_by(self, judged: Judged, tied: tuple[str, ...] = (), after: tuple[int, ...] = ()) -> Plan:
        """Return the plan of these steps with an outer loss at their end, or after these numbers of them, weighed.

        Args:
            judged: the outer loss.
            tied: names of what starts as φ.
            after: the numbers.
        """
        layout = self.layout.over(self.layout.order, judged.form, tied, after)
        judged = judged._replace(key=(judged.key, tied, after))
        return self._replace(tensors=[*self.tensors, *judged.tensors], layout=layout, judged=judged)

    def most(self, name: str, steps: int, args: list[Tensor], again: bool) -> int:
        """Return how many steps one graph may hold.

        Args:
            name: see :meth:`part`.
            steps: likewise.
            args: all that a graph of this step alone takes.
            again: whether all steps are on this batch.
        """
        if (name, again) not in self.graphs.most:
            with self.functional.snapshot().fork():
                try:
                    sizes = _sizes(self._traced(name, steps, args, ONE))
                    most = MOST_NODES // len(sizes)
                    if sum(sizes) > MOST_NUMBERS_OF_A_STEP:
                        most = min(most, MOST_LARGE_STEPS) if again and self._shares(name, steps, args) else 1
                except Exception:  # torch's, of many kinds, and the user's: said of the step alone
                    most = 1
            self.graphs.most[name, again] = max(1, most)
        return self.graphs.most[name, again]

    def _shares(self, name: str, steps: int, args: list[Tensor]) -> bool:
        """Return whether two steps on this batch have products in common, so that together they take less."""
        graph = simplified(self._traced(name, steps, args, (0, 0)).graph)
        alone = operations(graph)  # which is changed by what follows
        return operations(factored(graph)) <= WORTH * alone

    def _traced(self, name: str, steps: int, args: list[Tensor], order: tuple[int, ...]) -> Traced:
        functions = Functions(self.step, self.layout.over(order), self.functional.recorder)
        return traced_at(getattr(functions, name), args, steps)

    def part(self, name: str, steps: int, args: list[Tensor]) -> Part:
        """Return one of the functions of the stretch after ``steps`` other steps, made at the first call.

        Args:
            name: ``"take"``, ``"pull"``, ``"rule"``, ``"push"`` or ``"whole"``.
            steps: before this one.
            args: all that it takes.

        Raises:
            NotCompiled: it has to be eager.
        """
        graphs, order = self.graphs, self.layout.order
        kinds = () if graphs.numbered else tuple(self._kind(steps + 1 + n, args) for n in range(len(order)))
        rows = len(args[-1]) if name == "push" else 0
        key = name, kinds, rows, order, self.judged and self.judged.key
        if key not in graphs.parts:
            part = self._made(name, steps, args, {graphs.firsts[kind] for kind in kinds} or {FIRST})
            if part is None:
                graphs.numbered = False
                return self.part(name, steps, args)
            graphs.parts[key] = part
        return graphs.parts[key]

    def _made(self, name: str, steps: int, args: list[Tensor], watched: Collection[int]) -> Part | None:
        """Return one of the functions; ``None`` where the number of a step cannot be an input.

        Args:
            name: see :meth:`part`.
            steps: likewise.
            args: likewise.
            watched: the numbers of the updates that are watched.
        """
        functional, functions = self.functional, Functions(self.step, self.layout, self.functional.recorder)
        backend, numbered = backend_for(args[0].device.type), self.graphs.numbered
        if numbered and not self._is_numbered(functions, args):
            return None
        count, number = len(self.layout.order), None if numbered else steps

        def check(part: Part) -> None:
            dtype = precision(args, functional.autocast_dtype)
            agree(functions, name, part, args, steps, dtype)
            eager = lambda args: getattr(functions, name)(args, steps)  # noqa: E731
            own = self.layout.inputs if name in IN_HALVES else len(args)
            counted_alike(eager, lambda args: part(steps, args[:own]), functions, functional, args, dtype)

        return made_once(
            functional,
            lambda: made(functions, name, args, number, backend, self._places(watched)),
            check,
            "an inner step" if count == 1 else f"{count} inner steps",
            f"{_WORDS[name]}, {backend}",
        )

    def _is_numbered(self, functions: Functions, args: list[Tensor]) -> bool:
        with self.functional.snapshot().fork():
            try:
                traced_at(functions.update, args[: self.layout.inputs], None)
            except Exception:  # it branches on it, say
                return False
        return True

    def _places(self, numbers: Collection[int]) -> Callable[[Traced], list[Place]]:
        sight, functional, buffers = self.graphs.sight, self.functional, self.layout.buffers
        if self.judged is not None:
            sight = sight.beside(self.judged.sight)
        return lambda traced: sight.places(traced.read, traced.literal, functional, buffers, self.held, numbers)

    def _kind(self, number: int, args: list[Tensor]) -> int:
        """Return which of the different updates the one with this number is."""
        graphs = self.graphs
        if (id(graphs), number) not in self.known:
            key = number, graphs.sight.look_at_update(self.functional, number)
            if key not in graphs.updates:
                graphs.updates[key] = graphs.codes.setdefault(self._code(number, args), len(graphs.codes))
            kind = self.known[id(graphs), number] = graphs.updates[key]
            first = graphs.firsts.setdefault(kind, number)  # whose watch tells where the graph finds what it reads
            several = len(graphs.updates) > MOST_NUMBERS or len(graphs.codes) > MOST_UPDATES
            if several or self._kind(first, args) != kind:
                raise NotCompiled("the inner optimizer does something else at every step")
        return self.known[id(graphs), number]

    def _code(self, number: int, args: list[Tensor]) -> Hashable:
        """Return what tells an update from others: its graph, and what it reads."""
        functions = Functions(self.step, self.layout, self.functional.recorder)
        with self.functional.snapshot().fork():
            try:
                traced = traced_at(functions.update, args[: self.layout.inputs], number - 1)
            except Exception as error:  # torch's, of many kinds
                raise NotCompiled(reason(error)) from error
        return traced.graph.code, tuple(zip(traced.read, traced.literal, strict=True))


_WORDS = {
    "take": "forward",
    "pull": "with the derivative",
    "rule": "with the derivative of its rule",
    "push": "with tangents",
    "whole": "with the outer loss and the derivative",
}


def joined(plans: Sequence[Plan]) -> Plan:
    """Return the plan of a stretch from those of its steps, whose graphs are the same."""
    first = plans[0]
    if len(plans) == 1:
        return first
    if all(plan is first for plan in plans):
        return first._replace(layout=first.layout.over((0,) * len(plans)))
    tensors = [tensor for plan in plans for tensor in plan.tensors]
    return first._replace(tensors=tensors, layout=first.layout.over(tuple(range(len(plans)))))


def shared_out(count: int, most: int) -> list[int]:
    """Return the lengths of stretches that make ``count`` steps: equal ones, and single steps where there is a rest.

    >>> shared_out(20, 7), shared_out(23, 8), shared_out(3, 8)
    ([5, 5, 5, 5], [8, 8, 1, 1, 1, 1, 1, 1, 1], [3])
    """
    most = min(most, count)
    length = next((each for each in range(most, most // 2, -1) if count % each == 0), most)
    return [length] * (count // length) + [1] * (count % length)


def _sizes(traced: Traced) -> list[int]:
    """Return how many numbers each operation of a graph returns."""
    calls = [node for node in traced.graph.graph.nodes if node.op == "call_function"]
    values = [node.meta.get("val") for node in calls if node.target is not operator.getitem]
    return [value.numel() if isinstance(value, Tensor) else 0 for value in values]
