"""Batches by number, so that a run goes on where it was cut off."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Batches(Generic[T]):
    """One pass over ``make(0)``, ``make(1)``, …; Lightning keeps its position in checkpoints.

    Args:
        make: returns a batch, from its number alone.
        count: of batches.

    >>> batches = Batches(str, 3)
    >>> batches.load_state_dict({"next": 1})
    >>> list(batches)
    ['1', '2']
    """

    def __init__(self, make: Callable[[int], T], count: int) -> None:
        self._make, self._count, self._next = make, count, 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        while self._next < self._count:
            self._next += 1
            yield self._make(self._next - 1)
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def drawn(population: Sequence[T], count: int, *key: int | str) -> list[T]:
    """Return ``count`` members, no two the same where there are enough; the key fixes which."""
    draw = random.Random(repr(key))
    return draw.sample(population, count) if count <= len(population) else draw.choices(population, k=count)
