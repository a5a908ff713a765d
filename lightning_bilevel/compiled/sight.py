"""All that is watched of one graph: the losses that it calls, the inner optimizer's update and its penalty."""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Sequence

import torch
from torch import Tensor

from lightning_bilevel.compiled.fingerprint import Fingerprint
from lightning_bilevel.compiled.reasons import NotCompiled
from lightning_bilevel.compiled.watch import Level, Place, Watch, Watchman
from lightning_bilevel.modules.functional import FunctionalModule
from lightning_bilevel.problem import Batch
from lightning_bilevel.stacking import Flat, flattened, replaced

LEAST_TORCH = (2, 13)
"""What this has been tested with: guards of older versions see less."""

MOST_KINDS = 8
"""Kinds of batches that are compiled; each takes seconds."""

MOST_CHANGES = 8
"""States of the user's Python that are compiled for one kind of batch."""

MOST_LOSSES = 32
"""Losses of a strategy's own, stacks of other sizes among them, that are compiled."""


class Sight:
    """The watchmen of the losses that some functions call.

    Args:
        watchmen: one for each loss, that of the inner loss first.
        penalty: whether they call the inner optimizer's penalty.
    """

    def __init__(self, watchmen: Sequence[Watchman], penalty: bool = False) -> None:
        self._watchmen, self._penalty = watchmen, penalty

    def beside(self, other: Sight) -> Sight:
        """Return what watches the functions of another one, too."""
        return Sight([*self._watchmen, *other._watchmen], self._penalty)

    def look(self, functional: FunctionalModule) -> Hashable:
        """Return what tells the present of all these functions from other times; see :meth:`Watchman.look`."""
        penalty = self._watchmen[0].look_at_penalty(functional) if self._penalty else 0
        return tuple(watchman.look(functional) for watchman in self._watchmen), penalty

    def look_at_update(self, functional: FunctionalModule, number: int) -> Hashable:
        """Return what tells the present of an update from other times."""
        return self._watchmen[0].look_at_update(functional, number)

    def places(
        self,
        read: Sequence[Tensor],
        literal: Sequence[bool],
        functional: FunctionalModule,
        buffers: Sequence[str],
        held: Sequence[Tensor] = (),
        numbers: Collection[int] = (),
    ) -> list[Place]:
        """Return where tensors that a graph reads besides its arguments stand among those that the watch saw.

        Args:
            read: the tensors.
            literal: which of these are written in the code.
            functional: the module.
            buffers: names of those that are arguments.
            held: tensors that a strategy's own loss holds, which are arguments too.
            numbers: of the updates in the graph.

        Raises:
            NotCompiled: one is not among them; or what the losses read is not among these, so that its numbers have
                become a part of the graph.
        """
        watches = self._watches(numbers)
        seen = {id(value): Place(watch, n) for watch in watches for n, value in enumerate(watch.inputs)}
        if any(id(value) in seen for value in held):
            raise NotCompiled("it reads a tensor that the strategy gives it, too")
        levels, current = functional.levels, functional.swapper.current
        used = {id(current(name)) for name in (*levels.inner, *levels.outer, *buffers)}
        used = used.union(*(watchman.examples for watchman in self._watchmen))
        found: list[Place] = []
        for value, plain in zip(read, literal, strict=True):
            if not plain and id(value) not in seen:
                raise NotCompiled(f"it reads a tensor of shape {tuple(value.shape)} that cannot be followed")
            used.add(id(value))
            found.append(Place(None, 0, value) if plain else seen[id(value)])
        for value in (value for watch in watches for value in watch.inputs if id(value) not in used):
            raise NotCompiled(f"it takes numbers out of an array or a tensor of shape {tuple(value.shape)}")
        return found

    def _watches(self, numbers: Collection[int]) -> list[Watch]:
        of_optimizer = self._watchmen[0].of_optimizer(numbers, self._penalty)
        return [*(watchman.loss for watchman in self._watchmen), *of_optimizer]


@functools.cache
def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("+")[0].split(".")[:2]))


class Sights:
    """Watches what losses do on each kind of batch, and counts how much there is to compile."""

    def __init__(self) -> None:
        self._watchmen: dict[tuple[Level, int, Hashable], Watchman] = {}
        self._keys: set[Hashable] = set()
        self._counts: dict[Hashable, int] = {}

    def of(self, made_of: Fingerprint, stacked: int, batch: Batch, level: Level) -> tuple[Sight, Flat]:
        """Return what watches some functions on a batch, and the batch taken apart.

        Args:
            made_of: the functions.
            stacked: how many episodes a batch is stacked of.
            batch: the batch.
            level: of the loss that gets it.

        Raises:
            NotCompiled: that cannot be watched.
        """
        if _version(torch.__version__) < LEAST_TORCH:
            raise NotCompiled(f"that takes PyTorch {'.'.join(map(str, LEAST_TORCH))} or newer")
        flat = flattened(batch)
        if flat.rest is None:
            raise NotCompiled("a batch holds something else than tensors, numbers and texts in containers")
        self._keys.add(made_of.key)
        if len(self._keys) > MOST_LOSSES:
            raise NotCompiled("the strategy steps on another loss of its own at every step")
        if level == "inner" and ("_outer_loss" in made_of.calls) != bool(made_of.judged):
            raise NotCompiled("the strategy steps on a loss of its own, with outer batches of its own")
        watchmen = [self._watchman(made_of.functional, stacked, batch, flat.rest, level)]
        watchmen += [
            self._watchman(made_of.functional, stacked, each, flattened(each).rest, "outer") for each in made_of.judged
        ]
        return Sight(watchmen, "_penalty" in made_of.calls), flat

    def count(self, where: Hashable) -> None:
        """Count what is to be compiled.

        Raises:
            NotCompiled: there has been too much.
        """
        self._counts[where] = self._counts.get(where, 0) + 1
        if self._counts[where] > MOST_CHANGES:
            raise NotCompiled("hooks, or what else surrounds the losses, change from step to step")

    def _watchman(
        self, functional: FunctionalModule, stacked: int, batch: Batch, rest: Hashable, level: Level
    ) -> Watchman:
        kind = level, stacked, rest
        if kind not in self._watchmen:
            if sum(each[0] == level for each in self._watchmen) == MOST_KINDS:
                raise NotCompiled(f"there are more than {MOST_KINDS} kinds of batches, by their shapes and numbers")
            one = replaced(batch, lambda x: torch.empty_like(x[0] if stacked else x).contiguous())
            self._watchmen[kind] = Watchman(functional, one, level)
        return self._watchmen[kind]
