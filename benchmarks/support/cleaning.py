"""Data cleaning: its losses, the problem on minibatches, and fits that are looked at outside of their time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import report
from data_cleaning import CleaningData, DataCleaning
from lightning_bilevel import SGD, BilevelModule, Episode, HypergradientStrategy
from support import fits

Batch = Any
Cleaning = TypeVar("Cleaning", bound=DataCleaning)
Net = Callable[[Tensor], Tensor]

CORRUPTION, BATCH_SIZE, INNER_LR, OUTER_LR = 0.8, 100, 0.5, 0.1
BETA, DAMPING = 0.2, 0.1
SPARE = 2  # inner batches of an episode beyond the steps: one for Hessian products, one for the mixed product


def inner_loss(net: Net, logits: Tensor, batch: Batch) -> Tensor:
    x, y, index = batch
    return (logits[index].sigmoid() * F.cross_entropy(net(x), y, reduction="none")).mean()


def outer_loss(net: Net, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


class CleaningCNN(BilevelModule):
    """The net and a weight for each training example, as in the example.

    Args:
        num_examples: training examples.
        inner_steps: T.
        inner_start: as a ``BilevelModule`` has it.
        inner_lr: learning rate of the net.
        outer_lr: Adam's learning rate of the logits of the weights.
    """

    def __init__(
        self,
        num_examples: int,
        inner_steps: int,
        inner_start: str = "warm",
        inner_lr: float = 0.5,
        outer_lr: float = 0.1,
    ) -> None:
        super().__init__(inner_steps, inner_start)
        self.inner_lr, self.outer_lr = inner_lr, outer_lr
        self.net = cnn()
        self.logits = nn.Parameter(torch.zeros(num_examples))

    def inner_parameters(self) -> nn.Module:
        return self.net

    def outer_parameters(self) -> list[nn.Parameter]:
        return [self.logits]

    def inner_loss(self, batch: Any) -> Tensor:
        return inner_loss(self.net, self.logits, batch)

    def outer_loss(self, batch: Any) -> Tensor:
        return outer_loss(self.net, batch)

    def configure_inner_optimizer(self) -> SGD:
        return SGD(lr=self.inner_lr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.logits], lr=self.outer_lr)


def cnn(channels: Sequence[int] = (8, 16, 16)) -> nn.Sequential:
    """Return a net of three convolutions and a linear layer for images of 28 by 28 pixels."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28))]
    for inputs, outputs in zip((1, *channels), channels, strict=False):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # torch's own start takes hundreds of steps
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 4 * 4, 10))


class Episodes(IterableDataset):
    """Episodes without end, from a generator of their own: the same for everyone who asks with the same seed.

    Args:
        data: what ``setup`` made.
        inner_batches: in an episode.
        batch_size: examples in a batch; with at least all of them, a batch is the whole set.
        seed: of the order of the examples.
    """

    def __init__(self, data: CleaningData, inner_batches: int, batch_size: int, seed: int) -> None:
        self.data, self.inner_batches, self.batch_size, self.seed = data, inner_batches, batch_size, seed

    def __iter__(self) -> Iterator[Episode]:
        generator = torch.Generator().manual_seed(self.seed)
        inner, outer = (self._batches(dataset, generator) for dataset in (self.data.train, self.data.validation))
        while True:
            yield Episode([next(inner) for _ in range(self.inner_batches)], next(outer))

    def _batches(self, dataset: TensorDataset, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        size = min(self.batch_size, len(dataset))
        while True:
            if size == len(dataset):
                yield dataset.tensors
                continue
            order = torch.randperm(len(dataset), generator=generator)
            for index in order[: len(order) // size * size].split(size):
                yield dataset[index]


class Clock:
    """CPU seconds of this process, without those spent in :meth:`paused`."""

    def __init__(self) -> None:
        self._began = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        at = time.process_time()
        yield
        self._began += time.process_time() - at


Look = Callable[[int, float, Tensor], bool]
"""From outer steps, seconds and logits to whether the run may stop. The net is looked at in place."""


class Watch(pl.Callback):
    """Takes looks at a fit: when its seconds pass one mark after another."""

    def __init__(self, clock: Clock, marks: Sequence[float], look: Look) -> None:
        self.clock, self.marks, self.look = clock, list(marks), look

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        with self.clock.paused():
            trainer.should_stop = self.passed(trainer.global_step, module.logits.detach())

    def passed(self, step: int, logits: Tensor) -> bool:
        """Look if a mark is passed; return whether to stop, which the last mark says, too."""
        seconds = self.clock.seconds
        if seconds < self.marks[0]:
            return False
        self.marks = [mark for mark in self.marks if mark > seconds]
        return self.look(step, seconds, logits) or not self.marks


def fit(module: BilevelModule, strategy: HypergradientStrategy, episodes: Episodes, watch: Watch) -> None:
    """Train until ``watch`` has seen enough."""
    with report.screen():
        warnings.filterwarnings("ignore", "`ConjugateGradient")  # a net's Hessian is not positive definite: known
        fits.fit(module, DataLoader(episodes, batch_size=None), strategy, watch, max_epochs=1, min_epochs=0)


def cnn_data(data_dir: Path, seed: int) -> CleaningData:
    """Return the images standardized, which the net takes better to."""
    data = CleaningData(data_dir, corruption=CORRUPTION, seed=seed)
    data.setup()
    std, center = torch.std_mean(data.train.tensors[0])
    for part in (data.train, data.validation, data.test):
        x, *others = part.tensors
        part.tensors = ((x - center) / std, *others)
    return data


def validation_loss(net: nn.Module, data: CleaningData) -> float:
    x, y = data.validation.tensors
    with torch.no_grad():
        return F.cross_entropy(net(x), y).item()


def started(
    kind: type[Cleaning], strategy: HypergradientStrategy, inner_steps: int, outer_steps: int, seed: int
) -> tuple[Cleaning, Any]:
    """Return the module of the example on digits a few outer steps in, and the episode to estimate on."""
    pl.seed_everything(seed, verbose=False)
    module, data = kind(inner_steps=inner_steps), CleaningData(seed=seed)
    fits.fit(module, data, strategy, max_steps=outer_steps, max_epochs=-1)
    return module, next(iter(data.train_dataloader()))
