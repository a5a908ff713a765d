"""A loader of tasks for Lightning: fresh ones every epoch, shared out over processes, resumed by position."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_bilevel.errors import integer, value_error
from lightning_bilevel.few_shot.tasks import TaskDataset
from lightning_bilevel.problem import Episode


class TaskLoader(DataLoader[Any]):
    """A ``DataLoader`` of lists of tasks, as ``BilevelModule.episodes`` takes them.

    Every pass is an epoch with tasks of its own, unless the tasks are ``fixed``. Under ``Trainer(strategy="ddp")`` each
    of R processes gets every R-th task, under ``"ddp_directions"`` all get the same.

    **Resuming.** A checkpoint holds the epoch and the batches handed out of it, and the resumed run goes on with the
    next one: tasks go by number, so those before are not drawn again. This holds with workers too.

    Args:
        dataset: the tasks.
        batch_size: tasks in a batch, of each process.
        drop_last: leave out a last batch of fewer tasks.
        batch_sampler: given by Lightning where it shares tasks out over processes.
        **options: of ``DataLoader``, such as ``num_workers``. Tasks come in their order, for they are random.

    Raises:
        ValueError: ``dataset`` has no tasks, ``batch_size`` is not positive, or ``shuffle=True`` or a ``sampler``.

    >>> import torch
    >>> from lightning_bilevel.few_shot import FewShotTasks
    >>> tasks = FewShotTasks(torch.rand(40, 3), torch.arange(40) % 8, ways=2, queries=4, num_tasks=10)
    >>> loader = TaskLoader(tasks, batch_size=4)
    >>> [len(batch) for batch in loader]
    [4, 4, 2]
    """

    def __init__(
        self,
        dataset: TaskDataset,
        batch_size: int = 1,
        drop_last: bool = False,
        batch_sampler: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(dataset, TaskDataset):
            raise value_error("TaskLoader(dataset=...)", "a `TaskDataset` such as `FewShotTasks`", dataset)
        if options.pop("sampler", None) is not None or options.pop("shuffle", False):
            raise value_error("TaskLoader(...)", "without `shuffle` and `sampler`", "one", "Tasks are random already.")
        if batch_sampler is None:
            integer("TaskLoader(batch_size=...)", batch_size)
            batch_sampler = _TaskBatches(_InOrder(dataset), batch_size, drop_last)
        options.setdefault("collate_fn", list)
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self._tasks: _TaskBatches = batch_sampler
        self._epoch: int | None = None  # until the first pass: that of Lightning, which may be a later one
        self._batches = 0
        self._told_then: int | None = None
        self._resumed = 0  # a pass of which at most so many batches were handed out goes on

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose tasks the next pass has."""
        self._epoch, self._batches = epoch, 0

    def __iter__(self) -> Iterator[list[Episode]]:  # type: ignore[override]
        # A generator: Lightning asks for an iterator before it tells the epoch, and workers read ahead.
        self._begin_pass()
        for batch in super().__iter__():
            self._batches += 1
            if self._batches == len(self):  # saved at its end, a pass is resumed at the start of the next
                self._next_epoch()
            yield batch

    def _begin_pass(self) -> None:
        told, told_then = self._told(), self._told_then
        if self._epoch is None:
            self._epoch = told
        elif self._batches > self._resumed or (self._batches and told_then is not None and told > told_then):
            # Left before its end: by a `break`, or by Lightning under `limit_train_batches` before the checkpoint.
            self._next_epoch()
        self._told_then = None
        self._tasks.epoch, self._tasks.first = self._epoch, self._batches

    def _told(self) -> int:
        return int(getattr(self._tasks.sampler, "epoch", 0))

    def _next_epoch(self) -> None:
        assert self._epoch is not None
        self._epoch, self._batches, self._resumed = self._epoch + 1, 0, 0

    def state_dict(self) -> dict[str, int | None]:
        """Return the position: the epoch, the batches handed out of it, and the epoch as Lightning counts."""
        return {"epoch": self._epoch, "batches": self._batches, "told": self._told()}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Go on after the position that :meth:`state_dict` saved."""
        self._epoch, self._batches, self._told_then = state["epoch"], state["batches"] or 0, state["told"]
        # With `max_steps`, Lightning may take one batch to end an epoch that had ended before it begins the next.
        self._resumed = max(self._batches, 1)


class _InOrder(SequentialSampler):
    """Numbers of tasks in order; Lightning tells it the epoch, and puts a ``DistributedSampler`` in its place."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class _TaskBatches(BatchSampler):
    """Batches of pairs (epoch, number), from batch ``first`` on."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.epoch = self.first = 0
        if isinstance(sampler, DistributedSampler):
            # Lightning shuffles by a seed of its own, which a resumed run may not have.
            sampler.shuffle = False

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in islice(super().__iter__(), self.first, None):
            yield [(self.epoch, index) for index in batch]
