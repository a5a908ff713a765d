"""A data set whose entries are tasks, each drawn from a generator of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.utils.data import Dataset

from lightning_bilevel.errors import integer, value_error
from lightning_bilevel.problem import Episode
from lightning_bilevel.randomness import Key


class TaskDataset(Dataset[Episode], ABC):
    """Tasks by number: task i of epoch e depends on (seed, e, i) only.

    So any worker, any rank and a resumed run draw the same task. Nothing is stored. Derive from it to make tasks of
    your own, by :meth:`draw`.

    Args:
        num_tasks: tasks in an epoch.
        seed: of all draws.
        fixed: every epoch has the tasks of epoch 0, as validation and test want.

    Raises:
        ValueError: ``num_tasks`` is not positive.
        IndexError: while reading, an index that is not from 0 to ``num_tasks`` − 1.

    >>> class Lines(TaskDataset):
    ...     def draw(self, generator):
    ...         x, slope = torch.rand(4, generator=generator), torch.rand((), generator=generator)
    ...         return Episode(inner=[(x[:2], slope * x[:2])], outer=(x[2:], slope * x[2:]))
    >>> tasks = Lines(num_tasks=100)
    >>> torch.equal(tasks[7].outer[0], tasks[7].outer[0]), torch.equal(tasks[7].outer[0], tasks[1, 7].outer[0])
    (True, False)
    """

    def __init__(self, num_tasks: int, seed: int = 0, fixed: bool = False) -> None:
        self.num_tasks = integer(f"{type(self).__name__}(num_tasks=...)", num_tasks)
        self.seed, self.fixed = seed, fixed

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Episode:
        """Return a task: its support set as the inner batches, its query set as the outer one.

        Args:
            generator: the only source of randomness; seeded for this task.
        """

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, number: int | tuple[int, int]) -> Episode:
        """Return task i of epoch 0, or of epoch e for a pair (e, i)."""
        epoch, index = number if isinstance(number, tuple) else (0, number)
        if not 0 <= index < self.num_tasks:
            raise IndexError(f"Expected the number of a task to be from 0 to {self.num_tasks - 1}, got {index}.")
        episode = self.draw(Key((self.seed, 0 if self.fixed else epoch)).generator(index))
        if not isinstance(episode, Episode):
            raise value_error(f"{type(self).__name__}.draw(generator)", "an `Episode`", episode)
        return episode
