"""Loaders of numbers, and a module that writes down what it is given."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from lightning_bilevel.data.loaders import EpisodeLoader, prepare_episodes
from lightning_bilevel.problem import Episode
from tests.support.modules import trainer

UNUSUAL = [
    pytest.mark.filterwarnings("ignore:Your `(val|predict)_dataloader`'s sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
"""Marks of files whose fits are not what Lightning expects."""

Seen = list[tuple[list[list[float]], list[float]]]


class Unsized(IterableDataset):
    """``size`` numbers in random order, and no length."""

    def __init__(self, size: int, shuffle: bool = True) -> None:
        self.size, self.shuffle = size, shuffle

    def __iter__(self) -> Iterator[Tensor]:
        return iter((torch.randperm(self.size) if self.shuffle else torch.arange(self.size)).float())


class Noisy(Dataset):
    """``size`` numbers with random noise added when they are read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(())


class NoisyEverywhere(Noisy):
    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + random.random()


def numbers(size: int, batch_size: int = 1, shuffle: bool = True, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(size))), batch_size, shuffle=shuffle, **kwargs)


def values(batch: Any) -> list[float]:
    (batch,) = batch if isinstance(batch, list) else (batch,)
    return batch.flatten().tolist()


def contents(episode: Episode) -> tuple[list[list[float]], list[float]]:
    return [values(batch) for batch in episode.inner], values(episode.outer)


class Recorder(LightningModule):
    """Trains nothing and writes down the episodes it is given."""

    def __init__(self, skip_from: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Seen = []
        self.places: list[tuple[int, int]] = []
        self.evaluated: list[tuple[int, Seen]] = []
        self.skip_from = skip_from

    def on_train_start(self) -> None:
        prepare_episodes(self.trainer)

    def on_train_batch_start(self, batch: Episode, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.skip_from else None

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        assert isinstance(batch, Episode)
        self.seen.append(contents(batch))
        self.places.append((self.current_epoch, batch_idx))
        return self.weight * 1.0

    def evaluation_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Episode):
            self.evaluated.append((batch_idx, contents(batch)))

    validation_step = test_step = evaluation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make_trainer(callbacks: Sequence[Callback] = (), **kwargs: Any) -> Trainer:
    return trainer(*callbacks, **{"devices": 1, "num_sanity_val_steps": 0, "max_epochs": None, **kwargs})


def fit(loader: Any, *, ckpt_path: Path | None = None, val: Any = None, skip_from: int = -1, **kwargs: Any) -> Recorder:
    module = Recorder(skip_from)
    make_trainer(**kwargs).fit(module, loader, val, ckpt_path=ckpt_path)
    return module


def make_plain() -> EpisodeLoader:
    return EpisodeLoader(numbers(5), numbers(8, 2), 2)


def sharded() -> DataLoader:
    data = TensorDataset(torch.arange(16.0))
    return DataLoader(data, 2, sampler=DistributedSampler(data, 2, 1, seed=random.randrange(1000)))
