"""Which graphs hold now: made once for each kind of batch and each thing that the user's Python does."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lightning_bilevel.calculus.step import GradientStep, InnerStep
from lightning_bilevel.compiled.fingerprint import Fingerprint, fingerprint, outer_fingerprint
from lightning_bilevel.compiled.plan import FIRST, Graphs, Plan, takes_number
from lightning_bilevel.compiled.program import Form, Layout
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.compiled.step import CompiledStep
from lightning_bilevel.compiled.watch import OuterWatch, Watchman
from lightning_bilevel.compiled.whole import Judged
from lightning_bilevel.host import rank_zero_info, rank_zero_warn
from lightning_bilevel.inner_optimizers import InnerOptimizer
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import Batch, InnerState
from lightning_bilevel.stacking import Flat, flattened, replaced
from lightning_bilevel.tree import Params

LEAST_TORCH = (2, 13)
"""What this has been tested with: guards of older versions see less."""

MOST_KINDS = 8
"""Kinds of batches that are compiled; each takes seconds."""


MOST_CHANGES = 8
"""States of the user's Python that are compiled for one kind of batch."""


class Compiler:
    """Makes compiled steps of the steps of a module's problems, and keeps their graphs.

    What cannot be compiled is eager, with one warning that says why. Each graph is compared with the eager step when it
    is made.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Graphs] = {}
        self._watchmen: dict[Hashable, Watchman] = {}
        self._outer: dict[Hashable, OuterWatch] = {}
        self._counts: dict[Hashable, int] = {}
        self._refused = False
        self._judges = True
        self._said: set[str] = set()

    def compiled(self, step: GradientStep) -> InnerStep:
        """Return a step that is computed by graphs where there are some."""
        return step if self._refused else CompiledStep(step, self)

    def plan(self, step: CompiledStep, state: InnerState, phi: Params, batch: Batch) -> Plan | None:
        """Return the graphs for a batch, ``None`` where the step has to be eager."""
        if self._refused:
            return None
        try:
            made_of = fingerprint(step.problem)
        except NotCompiled as error:  # of this strategy; what else the fit has may go on
            self._say(error)
            return None
        try:
            return self._plan(step, made_of, state, phi, batch)
        except NotCompiled as error:
            self.refuse(error)
            return None

    def refuse(self, error: NotCompiled) -> None:
        """Take no step by graphs any more, and say why."""
        self._refused = True
        self._graphs, self._watchmen, self._outer = {}, {}, {}
        self._say(error)

    def _plan(self, step: CompiledStep, made_of: Fingerprint, state: InnerState, phi: Params, batch: Batch) -> Plan:
        if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < LEAST_TORCH:
            raise NotCompiled(f"that takes PyTorch {'.'.join(map(str, LEAST_TORCH))} or newer")
        functional, flat = made_of.functional, flattened(batch)
        if flat.rest is None:
            raise NotCompiled("a batch holds something else than tensors, numbers and texts in containers")
        watchman = self._watchman(functional, step.problem.stacked, batch, flat)
        optimizer = functional.inner_optimizer()
        where = (made_of.key, step.eager.mode, flat.rest, _shapes(state.flat()), _shapes(phi), _shapes(state.buffers))
        present = self._present(watchman, functional, optimizer)
        graphs = self._graphs.get((where, present))
        if graphs is None:
            if self._present(watchman, functional, optimizer) != present:
                raise NotCompiled("it does something else at every call")
            self._counts[where] = self._counts.get(where, 0) + 1
            if self._counts[where] > MOST_CHANGES:
                raise NotCompiled("hooks, or what else surrounds the losses, change from step to step")
            graphs = Graphs(watchman, Layout(state, phi, Form(batch, flat.tensors)), optimizer)
            self._graphs[where, present] = graphs
        return Plan(graphs, step.eager, functional, _tensors(flat), step.known, graphs.layout)

    def judged(self, step: CompiledStep, batch: Batch) -> Judged | None:
        """Return the outer loss on a batch as a part of a graph, ``None`` where it is none."""
        if not self._judges:
            return None
        try:
            made_of = outer_fingerprint(step.problem)
        except NotCompiled:  # of this strategy
            return None
        try:
            return self._judged(made_of, step.problem.stacked, batch)
        except NotCompiled as error:
            self._judges = False
            self.say(f"The outer loss is not compiled with the inner steps: {error}.")
            return None

    def _judged(self, made_of: Fingerprint, stacked: int, batch: Batch) -> Judged:
        flat = flattened(batch)
        if flat.rest is None:
            raise NotCompiled("its batch holds something else than tensors, numbers and texts in containers")
        kind = stacked, flat.rest
        if kind not in self._outer:
            if len(self._outer) == MOST_KINDS:
                raise NotCompiled(f"there are more than {MOST_KINDS} kinds of batches, by their shapes and numbers")
            self._outer[kind] = OuterWatch(made_of.functional, _example(batch, stacked))
        watch = self._outer[kind]
        key = made_of.key, kind, watch.look(made_of.functional)
        return Judged(key, watch, Form(batch, flat.tensors), _tensors(flat))

    def say(self, words: str) -> None:
        """Say something once that costs no more than time."""
        if words not in self._said:
            self._said.add(words)
            rank_zero_info(words)

    def _watchman(self, functional: FunctionalModule, stacked: int, batch: Batch, flat: Flat) -> Watchman:
        kind = stacked, flat.rest
        if kind not in self._watchmen:
            if len(self._watchmen) == MOST_KINDS:
                raise NotCompiled(f"there are more than {MOST_KINDS} kinds of batches, by their shapes and numbers")
            self._watchmen[kind] = Watchman(functional, _example(batch, stacked))
        return self._watchmen[kind]

    @staticmethod
    def _present(watchman: Watchman, functional: FunctionalModule, optimizer: InnerOptimizer) -> Hashable:
        update = watchman.look_at_update(functional, FIRST) if takes_number(optimizer) else 0
        return watchman.look(functional), type(optimizer), update

    def _say(self, error: NotCompiled) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            rank_zero_warn(f"The inner steps are not compiled: {error}. They are computed as without `compile=True`.")


def _example(batch: Batch, stacked: int) -> Batch:
    """Return a batch of one episode, whatever the numbers in it."""
    return replaced(batch, lambda x: torch.empty_like(x[0] if stacked else x).contiguous())


def _tensors(flat: Flat) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in flat.tensors]


def _shapes(values: Params) -> Hashable:
    return tuple((name, value.shape, value.dtype, value.device) for name, value in values.items())
