"""Batches by number, so that a run goes on where it was cut off, and processes share them out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, DistributedSampler

T = TypeVar("T")


class Numbered(Dataset[T]):
    """``make(0)``, ``make(1)``, …

    Args:
        make: returns a batch, from its number alone.
        count: of batches.
    """

    def __init__(self, make: Callable[[int], T], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> T:
        return self._make(number)


class Batches(DataLoader[T]):
    """One pass over numbered batches; Lightning keeps its position in checkpoints.

    Under ``Trainer(strategy="ddp")`` each of R processes gets every R-th batch, and where their number is no multiple
    of R, the first ones come again at the end, as with any data set; under ``"ddp_directions"`` all get the same.
    Batches are made when they are asked for, in the process itself.

    Args:
        dataset: the batches.
        **options: of ``DataLoader``, given by Lightning where it shares the batches out.

    >>> batches = Batches(Numbered(str, 3))
    >>> batches.load_state_dict({"next": 1})
    >>> list(batches)
    ['1', '2']
    """

    def __init__(self, dataset: Numbered[T], **options: Any) -> None:
        super().__init__(dataset, **{**options, "batch_size": None})
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.shuffle = False  # as Lightning would; what is random here is in the batches
        self._next = 0

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        # Not by workers: they would make those again that come before the position.
        for number in islice(self.sampler, self._next, None):
            self._next += 1
            yield self.dataset[number]
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def drawn(population: Sequence[T], count: int, *key: int | str) -> list[T]:
    """Return ``count`` members, no two the same where there are enough; the key fixes which."""
    draw = random.Random(repr(key))
    return draw.sample(population, count) if count <= len(population) else draw.choices(population, k=count)
