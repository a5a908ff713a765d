"""Episodes from two data loaders, resumed exactly from the middle of an epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Generator, Tensor, distributed
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, DistributedSampler, IterableDataset
from typing_extensions import Self, override

from lightning_bilevel.data.inputs import Batches, check_no_batch
from lightning_bilevel.errors import combination_error, integer, value_error
from lightning_bilevel.host import (
    CombinedLoader,
    DistributedSamplerWrapper,
    Trainer,
    notice_other_namespace,
    rank_zero_warn,
)
from lightning_bilevel.problem import Batch, Episode
from lightning_bilevel.randomness import seed_of

_Position = tuple[int, int]


class EpisodeLoader(CombinedLoader):
    """Yield episodes: ``inner_batches`` batches of one loader and one batch of another.

    An epoch is one pass over ``outer``; ``inner`` goes round and round, across epochs. Lightning treats both as any
    training loader: it puts in samplers for data parallel training and turns shuffling off to overfit. Its limits,
    such as ``limit_train_batches``, count episodes; for a fraction, both loaders need a length. In validation and
    test, too, ``inner`` goes on from run to run.

    **Resuming.** A checkpoint holds where each loader stands, and the batches read are read again and dropped. Random
    transforms resume exactly if they draw from torch (with ``num_workers=0``; in workers, from anything), but not in
    ``persistent_workers``, which torch seeds once.

    **Reloading.** A loader made anew for every epoch (``reload_dataloaders_every_n_epochs`` and a
    ``train_dataloader`` hook) starts at pass 0 again: give each another seed, such as ``seed=self.current_epoch``.

    Args:
        inner: a ``DataLoader``, a list of batches, or what else can be iterated again and again.
        outer: likewise.
        inner_batches: inner batches in an episode; with fewer than inner steps, the steps cycle through them. Default:
            one, with a warning in a fit where several steps would share it and there are more.
        seed: fixes all passes; the same on every rank. By default, for each loader, the seed of its distributed
            sampler or the initial seed of its own generator if it has one, and ``torch.initial_seed()`` otherwise,
            when its first pass begins: what ``seed_everything`` has set.

    Attributes:
        rank: the rank whose data this process sees; :func:`prepare_episodes` sets it. ``None`` is the process's own.

    Raises:
        ValueError: if ``inner_batches`` is not positive, a loader is a data set, or, while iterating, yields no batch.
        MisconfigurationError: if both are one loader with persistent workers.

    >>> loader = EpisodeLoader(inner=[1, 2, 3], outer=["a", "b"], inner_batches=2)
    >>> for epoch in range(2):
    ...     print(*loader)
    Episode(inner=[1, 2], outer='a') Episode(inner=[3, 1], outer='b')
    Episode(inner=[2, 3], outer='a') Episode(inner=[1, 2], outer='b')
    """

    def __init__(
        self,
        inner: Iterable[Batch],
        outer: Iterable[Batch],
        inner_batches: int | None = None,
        seed: int | None = None,
    ) -> None:
        notice_other_namespace()
        loaders: dict[str, Any] = {"inner": inner, "outer": outer}
        for name, loader in loaders.items():
            _check_loader(f"EpisodeLoader({name}=...)", loader)
        # Set afterwards, a list is a list of batches; Lightning would take it for a list of loaders. The outer loader
        # is first because Lightning's progress bars in validation show the length of the first.
        super().__init__({"outer": None, "inner": None}, "max_size_cycle")
        self.flattened = [outer, inner]
        self._chosen = inner_batches is not None
        self.inner_batches = integer("EpisodeLoader(inner_batches=...)", 1 if inner_batches is None else inner_batches)
        if inner is outer and getattr(inner, "persistent_workers", False):
            raise combination_error(
                "one loader with `persistent_workers=True` as `inner` and `outer`",
                "its workers serve one pass at a time",
                "Make two loaders",
            )
        self.rank: int | None = None
        self._outer, self._inner = _Reader("outer", seed), _Reader("inner", seed)
        self._handed_out = self._begun = self._positions()
        self._progress: Any = None  # Lightning's count of batches
        self._ended = False
        self._resumed = 0  # `__iter__` goes on with a pass of which at most so many batches were handed out

    @override
    def __len__(self) -> int:
        episodes = self._episodes()
        if math.isinf(episodes):
            raise TypeError("`EpisodeLoader(outer=...)` has no length.")
        return int(episodes)

    @override
    def __iter__(self) -> Self:
        self._outer.position, self._inner.position = self._handed_out
        if self._outer.batches > self._resumed:
            self._next_pass()
        self._ended = False
        return self

    @override
    def __next__(self) -> Any:
        """Return the next episode; in a Trainer, the triple that Lightning expects: with its number, and 0."""
        in_trainer, begun = self.limits is not None, self._handed_out
        # Lightning reads one ahead then: an episode is handed out when the next is asked for.
        reads_ahead = in_trainer and math.isinf(self._episodes())
        if reads_ahead:
            self._handed_out = self._positions()
        if self._ended:
            raise StopIteration
        (outer_loader, inner_loader), rank = self.flattened, self._rank()
        outer = self._outer.read(outer_loader, rank, 1)
        if not outer:
            self._end_pass()
            raise StopIteration
        number = self._outer.batches - 1
        episode = Episode(Batches(self._inner.read_on(inner_loader, rank, self.inner_batches)), outer[0])
        if self._outer.batches >= self._episodes():
            self._end_pass()
        elif not reads_ahead:
            self._handed_out = self._positions()
        self._begun = begun
        return (episode, number, 0) if in_trainer else episode

    @override
    def reset(self) -> None:
        """Leave the Trainer and shut the workers down; the position is kept."""
        self._outer.close()
        self._inner.close()
        super().reset()
        for loader in self.flattened:
            for part in getattr(loader, "flattened", []):  # of a level that is made of several loaders
                CombinedLoader(part).reset()
        self.limits = self._progress = None

    @override
    def _state_dicts(self) -> list[dict[str, Any]]:
        # A step that an exception cut short is taken again.
        in_flight = self._progress is not None and self._progress.current.ready > self._progress.current.processed
        readers = zip((self._outer, self._inner), self._begun if in_flight else self._handed_out, strict=True)
        return [{reader.name: {"seed": reader.seed, "position": position} for reader, position in readers}]

    @override
    def _load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        if not states:
            return
        if set(states[0]) != {"outer", "inner"}:
            raise combination_error(
                "this checkpoint with `EpisodeLoader`",
                "the position in the data that it holds is that of another loader",
                "Resume with the loader of that run",
            )
        for reader in (self._outer, self._inner):
            reader.seed, reader.position = states[0][reader.name]["seed"], tuple(states[0][reader.name]["position"])
        self._handed_out = self._begun = self._positions()
        # With `max_steps`, Lightning may take one episode to end an epoch that had ended before it calls `__iter__`.
        self._resumed = max(self._outer.batches, 1)
        # Lightning looks at the two loaders one by one, which indeed cannot resume.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    def _episodes(self) -> float:
        length = _length(self.flattened[0])
        if not length:  # Lightning would end the fit as if it were done
            self._outer.expect_batches()
        return length if self.limits is None else min(length, self.limits[0])

    def _rank(self) -> int:
        if self.rank is not None:
            return self.rank
        return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

    def _positions(self) -> tuple[_Position, _Position]:
        return self._outer.position, self._inner.position

    def _next_pass(self) -> None:
        self._outer.next_pass()
        self._handed_out = self._positions()
        self._resumed = 0

    def _end_pass(self) -> None:
        # Saved at its end, a pass is resumed at the start of the next; else Lightning would run an epoch of no batch.
        self._next_pass()
        self._ended = True


def _check_loader(what: str, loader: Any) -> None:
    """Refuse what is no loader: a data set, whose items are examples, or a batch, which would be gone over by parts."""
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        hint = "Wrap it: `DataLoader(dataset, batch_size=...)`, or `batch_size=None` if its items are batches."
        raise value_error(what, "a loader of batches", type(loader).__name__, hint)
    if isinstance(loader, (Tensor, Mapping, str)) or hasattr(loader, "_fields"):
        raise value_error(what, "a loader of batches", type(loader).__name__, "Write a single batch as `[batch]`.")
    if isinstance(loader, (list, tuple)):
        check_no_batch(what, loader, "batches")


def prepare_episodes(trainer: Trainer) -> None:
    """Give the Trainer's :class:`EpisodeLoader` what Lightning does not; call this in ``on_train_start``.

    That is its position in the data if the checkpoint was written at an epoch's end and training goes by
    ``max_epochs``, or if ``configure_optimizers`` read ``trainer.estimated_stepping_batches`` (otherwise the episodes
    of the first epoch come again); the rank whose data the Trainer's strategy wants this process to see; and the count
    of finished steps, so that one that was cut off is taken again. Another kind of loader gets its position, if it has
    one. ``BilevelModule`` calls it.

    Args:
        trainer: in ``fit``.

    Raises:
        ValueError: the training data are lists of episodes, which Lightning takes for many loaders.
    """
    loop = trainer.fit_loop
    _finish_batch(loop)
    loader, fetcher, states = loop._combined_loader, loop._data_fetcher, loop._combined_loader_states_to_load
    if loader is None or fetcher is None:
        return
    moved = bool(states)
    if isinstance(loader, EpisodeLoader):
        loader._progress = loop.epoch_loop.batch_progress
        if not loader._chosen:
            _warn_of_shared_batches(loader.flattened[1], getattr(trainer.lightning_module, "inner_steps", 1))
        before, loader.rank = loader._rank(), (trainer.distributed_sampler_kwargs or {}).get("rank", 0)
        moved |= loader.rank != before
    else:
        _refuse_lists(loader.iterables)
        _look_at_levels(loader.iterables, trainer.lightning_module)
    if moved:
        loop._combined_loader_states_to_load = []
        loader._load_state_dicts(states)
        iter(fetcher)  # what it read ahead is dropped


def _warn_of_shared_batches(inner: Any, steps: int) -> None:
    if min(steps, _length(inner)) > 1:
        rank_zero_warn(
            f"All {steps} inner steps of an episode share one inner batch. `EpisodeLoader(inner_batches={steps})` "
            "gives each its own; `inner_batches=1` says that one is meant."
        )


def _look_at_levels(data: Any, module: Any) -> None:
    """Look at a mapping of a loader of each level, which Lightning combines, as at an :class:`EpisodeLoader`."""
    if not isinstance(data, Mapping) or set(data) != {"inner", "outer"}:
        return
    for level, loader in data.items():
        if _length(loader) == 0:
            raise value_error(f"the training data[{level!r}]", "a loader of one or more batches", 0)
    makes_its_own = not module.episodes.__module__.startswith(__name__.partition(".")[0])
    if not makes_its_own and not isinstance(data["inner"], (list, tuple, Mapping)):
        _warn_of_shared_batches(data["inner"], module.inner_steps)


def refuse_no_batches(trainer: Trainer) -> None:
    """Refuse a fit that is over without a batch, for there is none; call this in ``on_fit_end``.

    Raises:
        ValueError: the training data are empty, and not by ``limit_train_batches=0``.
    """
    if trainer.fit_loop.max_batches == 0 and trainer.limit_train_batches != 0:
        raise value_error("the training data", "a loader of one or more batches", 0)


def _refuse_lists(data: Any) -> None:
    """Refuse data that Lightning has taken apart into one loader for each tensor: it would go over their rows."""
    parts = tree_leaves(data, is_leaf=lambda part: isinstance(part, Episode))
    if any(isinstance(part, Episode) for part in parts):
        raise value_error(
            "the training data",
            "a loader of episodes",
            type(data).__name__,
            "Lightning takes a list for several loaders. Pass `DataLoader(episodes, batch_size=None)`, where an entry "
            "may be a list of episodes too, or `EpisodeLoader(inner=..., outer=...)`.",
        )
    levels = data.values() if isinstance(data, Mapping) and set(data) == {"inner", "outer"} else []
    if any(isinstance(part, Tensor) for level in levels for part in tree_leaves(level) if part is not level):
        raise value_error(
            "the training data",
            "a mapping of loaders",
            "lists of batches",
            "Lightning takes a list for several loaders. Pass `EpisodeLoader(inner=[...], outer=[...])`.",
        )


def _finish_batch(loop: Any) -> None:
    """Count the batch at whose end the checkpoint was written; from 2.5 on, Lightning does.

    What Lightning 2.4 restores has it processed and not completed, so that it would count one batch too many.
    """
    batches = loop.epoch_loop.batch_progress
    seen = batches.total
    cut_off = seen.ready == seen.started == seen.processed == seen.completed + 1
    if hasattr(loop.epoch_loop, "restarted_on_train_batch_end") or not (loop.epoch_loop.restarting and cut_off):
        return
    batches.increment_completed()
    if batches.is_last_batch or batches.current.completed >= loop.max_batches:
        loop.epoch_progress.increment_processed()
        loop.epoch_progress.increment_completed()
        batches.reset_on_run()
        loop.epoch_loop.scheduler_progress.reset_on_run()
        loop.epoch_loop.automatic_optimization.optim_progress.reset_on_run()
        loop.epoch_loop.val_loop.batch_progress.total.reset()


class _Reader:
    """Reads a loader pass after pass.

    What a pass yields depends on (seed, name, number of the pass, rank) only, so ``position``, finished passes and
    batches read of this one, says all: a pass is opened again under the same seed. While it reads, all torch generators
    in its reach, the global one and those of the loader, sampler and dataset, are in states of its own, and afterwards
    they are back in theirs; whatever in it has a ``set_epoch`` is given the number of the pass.
    """

    def __init__(self, name: str, seed: int | None) -> None:
        self.name, self.seed = name, seed
        self.passes = self.batches = 0
        self._iterator: Iterator[Batch] | None = None
        self._sources: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = []  # how to read and to set their states
        self._states: list[Any] = []

    @property
    def position(self) -> _Position:
        return self.passes, self.batches

    @position.setter
    def position(self, position: _Position) -> None:
        if position != self.position:
            self.close()
            self.passes, self.batches = position

    def next_pass(self) -> None:
        self.position = self.passes + 1, 0

    def close(self) -> None:
        """Let go of the iterator and with it of its workers; the next read opens the pass again."""
        self._iterator = None

    def read(self, loader: Any, rank: int, count: int) -> list[Batch]:
        """Return so many batches of this pass, or what is left of it."""
        iterator = self._open(loader, rank) if self._iterator is None else self._iterator
        with self._own_states():
            batches = list(islice(iterator, count))
        self.batches += len(batches)
        self.expect_batches()
        return batches

    def read_on(self, loader: Any, rank: int, count: int) -> list[Batch]:
        """Return so many batches, of this pass and those that follow."""
        batches = self.read(loader, rank, count)
        while len(batches) < count:
            self.next_pass()
            batches += self.read(loader, rank, count - len(batches))
        return batches

    def _open(self, loader: Any, rank: int) -> Iterator[Batch]:
        parts = _parts(loader)
        own = [part.generator for part in parts if isinstance(getattr(part, "generator", None), Generator)]
        shards = [part for part in parts if isinstance(part, DistributedSampler)]
        if self.seed is None:
            # In this order because the ranks have to agree on a sampler's seed.
            seeds = [part.seed for part in shards] + [generator.initial_seed() for generator in own]
            self.seed = seeds[0] if seeds else torch.initial_seed()
        for part in parts:
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self.passes)
        # What this sampler shuffles it deals out to the ranks, so they have to shuffle alike.
        dealt_out = any(isinstance(part, DistributedSamplerWrapper) for part in shards)
        seed = _mixed(self.seed, self.name, self.passes, 0 if dealt_out else rank)
        generators = [torch.default_generator, *own]
        self._sources = [(each.get_state, each.set_state) for each in generators]
        self._sources += [(partial(getattr, part, "seed"), partial(setattr, part, "seed")) for part in shards]
        start: list[Any] = [Generator(each.device).manual_seed(seed).get_state() for each in generators]
        start += [_mixed(self.seed, self.name)] * len(shards)
        for part in parts:
            if getattr(part, "persistent_workers", False) and getattr(part, "_iterator", None) is None:
                # A pass that starts workers draws their seed first. Have them started, so that all passes draw alike.
                self._states = start
                with self._own_states():
                    iter(part)
        self._states = start
        with self._own_states():
            self._iterator = iterator = iter(loader)
            read = sum(1 for _ in islice(iterator, self.batches))
        self._expect(self.batches, read, "So many had been read when the checkpoint was written.")
        return iterator

    @contextmanager
    def _own_states(self) -> Iterator[None]:
        """Put the generators into this pass's states, and back afterwards."""
        outside = [get() for get, _ in self._sources]
        for (_, put), state in zip(self._sources, self._states, strict=True):
            put(state)
        try:
            yield
        finally:
            self._states = [get() for get, _ in self._sources]
            for (_, put), state in zip(self._sources, outside, strict=True):
                put(state)

    def expect_batches(self) -> None:
        """Raise where a pass has none."""
        self._expect(1, self.batches, "An iterator yields none when it is used up: pass a list or a `DataLoader`.")

    def _expect(self, least: int, batches: int, hint: str) -> None:
        if batches < least:
            expected = f"an iterable of {least} or more batches in every pass"
            raise value_error(f"EpisodeLoader({self.name}=...)", expected, batches, hint)


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # what Lightning takes for unknown
        return math.inf


def _mixed(*words: int | str) -> int:
    """Return a 62-bit seed: ``DistributedSampler`` adds the epoch to its own."""
    return seed_of(*words) >> 1


def _parts(loader: Any) -> list[Any]:
    """Return the loader, those that it is made of, and the samplers and datasets in them."""
    found: dict[int, Any] = {}
    pending = [loader]
    while pending:
        part = pending.pop(0)
        if part is not None and id(part) not in found:
            found[id(part)] = part
            pending += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "_sampler", "dataset")]
            pending += getattr(part, "flattened", [])
    return list(found.values())
