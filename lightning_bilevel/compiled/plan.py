"""The graphs that were made for one kind of batch, and which of them a step with some number takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from lightning_bilevel.calculus.step import GradientStep
from lightning_bilevel.compiled.agree import agree, precision
from lightning_bilevel.compiled.graphs import Traced, backend_for
from lightning_bilevel.compiled.program import Functions, Layout, Part, made, traced_at
from lightning_bilevel.compiled.reasons import NotCompiled, reason
from lightning_bilevel.compiled.sight import Sight
from lightning_bilevel.compiled.watch import Place, drawn_beside_torch
from lightning_bilevel.host import rank_zero_info
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.inner_optimizers.base import is_ours
from lightning_bilevel.inner_optimizers.elementwise import ElementwiseOptimizer
from lightning_bilevel.modules.functional import FunctionalModule

MOST_UPDATES = 8
"""Different updates of the inner optimizer that are compiled; each takes as long as a step."""

MOST_NUMBERS = 64
"""Numbers of updates that are looked at to find these."""


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
    """

    def __init__(self, sight: Sight, layout: Layout, optimizer: InnerOptimizer) -> None:
        self.sight, self.layout = sight, layout
        self.numbered = takes_number(optimizer)
        self.parts: dict[Hashable, Part] = {}
        self.updates: dict[Hashable, int] = {}
        self.codes: dict[Hashable, int] = {}
        self.firsts: dict[int, int] = {}


def takes_number(optimizer: InnerOptimizer) -> bool:
    """Return whether an update's number may be a tensor, which a rule of the user's may take for another thing."""
    return is_ours(optimizer) and isinstance(optimizer, ElementwiseOptimizer) and not optimizer.per_step


class Plan(NamedTuple):
    """The graphs for a batch, in the estimate that runs.

    Attributes:
        graphs: those that hold now.
        step: the eager step.
        functional: the module.
        tensors: those of the batch, and those that a strategy's own loss holds.
        known: what the watch said in this run of steps, by number of update.
        held: the last ones of the tensors.
    """

    graphs: Graphs
    step: GradientStep
    functional: FunctionalModule
    tensors: list[Tensor]
    known: dict[Hashable, int]
    held: list[Tensor]

    @property
    def layout(self) -> Layout:
        """How the graphs name their tensors."""
        return self.graphs.layout

    def part(self, name: str, steps: int, args: list[Tensor]) -> Part:
        """Return one of the functions of the step after ``steps`` others, made at the first call.

        Args:
            name: ``"take"``, ``"pull"`` or ``"push"``.
            steps: before this one.
            args: all that it takes.

        Raises:
            NotCompiled: it has to be eager.
        """
        kind = 0 if self.graphs.numbered else self._kind(steps + 1, args)
        rows = len(args[-1]) if name == "push" else 0
        if (name, kind, rows) not in self.graphs.parts:
            part = self._made(name, steps, args, self.graphs.firsts.get(kind, FIRST))
            if part is None:
                self.graphs.numbered = False
                return self.part(name, steps, args)
            self.graphs.parts[name, kind, rows] = part
        return self.graphs.parts[name, kind, rows]

    def _made(self, name: str, steps: int, args: list[Tensor], watched: int) -> Part | None:
        """Return one of the functions; ``None`` where the number of a step cannot be an input.

        Args:
            name: see :meth:`part`.
            steps: likewise.
            args: likewise.
            watched: the number of the update that is watched.
        """
        began = time.perf_counter()
        functional, functions = self.functional, Functions(self.step, self.layout, self.functional.recorder)
        backend, numbered = backend_for(args[0].device.type), self.graphs.numbered
        before = functional.snapshot()
        with before.fork():
            try:
                if numbered and not self._is_numbered(functions, args):
                    return None
                part = made(functions, name, args, None if numbered else steps, backend, self._places(watched))
            except NotCompiled:
                raise
            except Exception as error:  # torch's, of many kinds
                raise NotCompiled(reason(error)) from error
            if drawn_beside_torch(functional, before):
                raise NotCompiled("it draws from NumPy, `random` or a generator of its own")
            agree(functions, name, part, args, steps, precision(args, functional.autocast_dtype))
        took, kind = time.perf_counter() - began, type(functional.module).__name__
        rank_zero_info(f"Compiled an inner step of `{kind}` ({_WORDS[name]}, {backend}) in {took:.1f} s.")
        return part

    def _is_numbered(self, functions: Functions, args: list[Tensor]) -> bool:
        try:
            traced_at(functions.update, args[: self.layout.inputs], None)
        except Exception:  # it branches on it, say
            return False
        return True

    def _places(self, number: int) -> Callable[[Traced], list[Place]]:
        sight, functional, buffers = self.graphs.sight, self.functional, self.layout.buffers
        return lambda traced: sight.places(traced.read, traced.literal, functional, buffers, self.held, number)

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


_WORDS = {"take": "forward", "pull": "with its derivative", "push": "with tangents"}
