"""``bilevel_data``: an existing LightningDataModule, as it is, whose training batches are episodes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_bilevel.data.loaders import EpisodeLoader
from lightning_bilevel.errors import combination_error, integer, missing_error, number, value_error
from lightning_bilevel.host import (
    CombinedLoader,
    LightningDataModule,
    RunningStage,
    TrainerFn,
    _process_dataloader,
    _resolve_overfit_batches,
    is_foreign,
    is_overridden,
    mixing,
)
from lightning_bilevel.problem import Batch
from lightning_bilevel.randomness import seed_of


def bilevel_data(
    datamodule: LightningDataModule,
    *,
    inner_batches: int | None = None,
    seed: int | None = None,
    split: float | None = None,
    val_loader: int | str | None = None,
) -> LightningDataModule:
    """Make an existing LightningDataModule yield episodes in training, without a change to its code.

    Its training loader is the inner level and its validation loader the outer one, as in
    ``EpisodeLoader(train, validation)``; with ``split`` both are parts of its training data. All else is its own, as in
    a fit without levels: ``prepare_data``, ``setup``, ``teardown``, its state, its hyperparameters, and the loaders of
    validation, test and prediction. Its batch hooks (``on_before_batch_transfer``, ``transfer_batch_to_device``,
    ``on_after_batch_transfer``) get every batch of an episode.

    What comes back stands for ``datamodule``: it has its class and its attributes, so that a module's
    ``self.trainer.datamodule.num_classes`` reads, and ``trainer.datamodule.batch_size = 8`` writes, the original's. Its
    part of a checkpoint is the original's, too.

    Where Lightning would combine several training loaders (in a list, a dict, a ``CombinedLoader``), an inner batch is
    what the training step gets in a fit without levels. With ``reload_dataloaders_every_n_epochs``, each loader that is
    made anew shuffles anew.

    Args:
        datamodule: any LightningDataModule.
        inner_batches: inner batches in an episode, as in :class:`EpisodeLoader`.
        seed: fixes the order of the data, as in :class:`EpisodeLoader`, and the split (default of that: 0).
        split: fraction of the training data that makes the outer level; it is kept out of the inner one. Default: the
            outer level is the validation loader.
        val_loader: which of several validation loaders, by number or key. Default: one after another.

    Returns:
        A data module, for ``trainer.fit(model, datamodule=...)`` and everything else that takes a data module.

    Raises:
        ValueError: a bad argument; in a fit, training data that cannot be split, or no such validation loader.
        MisconfigurationError: no training or validation loader; in a fit, loaders that yield episodes already.

    >>> class Data(LightningDataModule):
    ...     num_classes = 10
    ...     def train_dataloader(self): return DataLoader(range(6), batch_size=2)
    ...     def val_dataloader(self): return DataLoader(range(6, 8), batch_size=1)
    >>> data = bilevel_data(Data(), inner_batches=2)
    >>> print(next(iter(data.train_dataloader())), data.num_classes)
    Episode(inner=[tensor([0, 1]), tensor([2, 3])], outer=tensor([6])) 10
    """
    if is_foreign(datamodule):
        raise combination_error(*mixing(f"`bilevel_data` with `{type(datamodule).__name__}`"))
    if not isinstance(datamodule, LightningDataModule):
        raise value_error("bilevel_data(datamodule)", "a `LightningDataModule`", type(datamodule).__name__)
    owner = type(datamodule).__name__
    if type(datamodule) is _Episodic:
        raise combination_error("`bilevel_data` twice", "its data are episodes already", "Pass on what it returned")
    if inner_batches is not None:
        integer("bilevel_data(inner_batches=...)", inner_batches)
    if split is not None and number("bilevel_data(split=...)", split, above=0, at_most=1) == 1:
        raise value_error("bilevel_data(split=...)", "a fraction between 0 and 1", split)
    if split is not None and val_loader is not None:
        raise combination_error(
            "`bilevel_data(split=..., val_loader=...)`",
            "with `split` the outer level is a part of the training data",
            "Leave one of them out",
        )
    for hook in ("train_dataloader",) if split is not None else ("train_dataloader", "val_dataloader"):
        if not is_overridden(hook, datamodule):
            other = ", or make the outer level of training data: `bilevel_data(..., split=0.2)`"
            fix = f"Add `def {hook}(self): ...`{other if hook == 'val_dataloader' else ''}"
            raise missing_error(owner, f"`{hook}`", fix)
    return _Episodic(datamodule, _Levels(inner_batches, seed, split, val_loader))


class _Levels(NamedTuple):
    """What becomes of the loaders; the arguments of :func:`bilevel_data`."""

    inner_batches: int | None
    seed: int | None
    split: float | None
    val_loader: int | str | None

    def episodes(self, data: LightningDataModule) -> EpisodeLoader:
        """Return the loader of episodes of a data module that is set up."""
        train = _several(data.train_dataloader(), "max_size_cycle")
        if any(isinstance(each, EpisodeLoader) for each in (train, *train.flattened)):
            raise combination_error(
                f"`bilevel_data` with `{type(data).__name__}`",
                "its `train_dataloader` returns an `EpisodeLoader` already",
                "Pass the data module itself",
            )
        if self.split is not None:
            inner, outer = self._parts(train)
        else:
            inner, outer = train, _several(data.val_dataloader(), "sequential", self.val_loader)
        trainer = data.trainer
        return EpisodeLoader(_level(inner, trainer), _level(outer, trainer), self.inner_batches, self._seed(trainer))

    def _seed(self, trainer: Any) -> int | None:
        """Return the seed of a loader: another one where each epoch may have its own."""
        if trainer is None or not trainer.reload_dataloaders_every_n_epochs:
            return self.seed
        seed = int(trainer.strategy.broadcast(torch.initial_seed())) if self.seed is None else self.seed
        return seed_of(seed, trainer.current_epoch) >> 1

    def _parts(self, loaders: CombinedLoader) -> tuple[CombinedLoader, CombinedLoader]:
        """Return loaders of the data that are left for the inner level, and of those for the outer one."""
        assert self.split is not None
        parts = [_split(each, self.split, self.seed or 0) for each in loaders.flattened]
        inner, outer = copy.copy(loaders), copy.copy(loaders)
        inner.flattened, outer.flattened = [left for left, _ in parts], [taken for _, taken in parts]
        return inner, outer


class _Episodic(LightningDataModule):
    """Stands for a data module: has its attributes and its class, and another training loader.

    Its methods run on the data module itself, so that what they do with their own training loader is as ever.
    """

    def __init__(self, source: LightningDataModule, levels: _Levels) -> None:
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_levels", levels)

    def __getattribute__(self, name: str) -> Any:
        if name in ("train_dataloader", "_source", "_levels", "__reduce_ex__", "__reduce__"):
            return object.__getattribute__(self, name)
        return getattr(self._source, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._source, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._source, name)

    def __str__(self) -> str:
        return str(self._source)

    def __repr__(self) -> str:
        return f"bilevel_data({self._source!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _Episodic, (self._source, self._levels)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def train_dataloader(self) -> EpisodeLoader:
        """Return the loader of episodes."""
        return self._levels.episodes(self._source)


class _Batches:
    """Several loaders as one loader of batches.

    Args:
        loaders: what Lightning combines.

    Attributes:
        flattened: each of them.
    """

    def __init__(self, loaders: CombinedLoader) -> None:
        self._loaders, self.flattened = loaders, loaders.flattened

    def __iter__(self) -> Iterator[Batch]:
        """Begin a pass of its own."""
        return (batch for batch, _, _ in copy.copy(self._loaders))

    def __len__(self) -> int:
        lengths = [len(each) for each in self.flattened]
        total: Any = {"sequential": sum, "min_size": min}.get(self._loaders._mode, max)
        return int(total(lengths))


def _several(loaders: Any, mode: Any, chosen: int | str | None = None) -> CombinedLoader:
    """Return what a hook returned as Lightning combines it; one loader is not a collection of itself."""
    combined = copy.copy(loaders) if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)
    if chosen is None:
        return combined
    entries = combined.iterables
    named = dict(entries) if isinstance(entries, Mapping) else {}
    several = list(named.values()) if named else combined.flattened
    if chosen in named:
        return CombinedLoader(named[chosen], mode)
    if isinstance(chosen, int) and 0 <= chosen < len(several):
        return CombinedLoader(several[chosen], mode)
    raise value_error("bilevel_data(val_loader=...)", f"one of {list(named) or list(range(len(several)))}", chosen)


def _level(loaders: CombinedLoader, trainer: Any) -> Any:
    """Return the loader of a level; of several, each is prepared as Lightning prepares a loader of training data."""
    if loaders.iterables is loaders.flattened[0]:
        return loaders.iterables
    if trainer is not None:
        if trainer.overfit_batches > 0:
            _resolve_overfit_batches(loaders, RunningStage.TRAINING)
        loaders.flattened = [
            _process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, each) for each in loaders.flattened
        ]
    return _Batches(loaders)


def _split(loader: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Return two loaders like this one, of disjoint parts of its data."""
    data: Any = getattr(loader, "dataset", None)
    sampler: Any = getattr(loader, "sampler", None)
    plain = (
        isinstance(loader, DataLoader)
        and not isinstance(data, IterableDataset)
        and type(loader.batch_sampler) in (BatchSampler, type(None))
        and type(sampler) in (RandomSampler, SequentialSampler)
        and not (getattr(sampler, "replacement", False) or len(sampler) < len(data))
    )
    if not plain:
        raise value_error(
            "train_dataloader()",
            "a `DataLoader` of a map-style dataset, in order or shuffled, to split its data",
            type(loader).__name__,
            "Split the data in `setup`, and let `val_dataloader` return the part for the outer level.",
        )
    if (count := len(data)) < 2:
        raise value_error("bilevel_data(split=...)", "a fraction of two examples or more", count)
    outer = min(max(round(fraction * count), 1), count - 1)
    order = torch.randperm(count, generator=Generator().manual_seed(seed)).tolist()
    return _like(loader, sorted(order[outer:])), _like(loader, sorted(order[:outer]))


def _like(loader: Any, indices: list[int]) -> Any:
    """Return a loader of some of the examples, with the settings of this one."""
    settings = {
        name: getattr(loader, name)
        for name in ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
    }
    workers = ("multiprocessing_context", "prefetch_factor", "persistent_workers") if loader.num_workers else ()
    settings |= {name: getattr(loader, name) for name in workers}
    shuffle = isinstance(loader.sampler, RandomSampler)
    return type(loader)(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        shuffle=shuffle,
        drop_last=loader.drop_last,
        **settings,
    )
