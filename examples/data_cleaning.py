"""Find the wrong labels of a training set (hyper-cleaning).

Half of the training labels are wrong. Every training example has a weight, sigmoid(logit); the logits are the outer
parameters, a small net the inner ones. The net is trained on the weighted examples, the weights are trained so that
the net does well on a few hundred validation examples with right labels. Weights of wrong labels fall to 0.

    python examples/data_cleaning.py
    python examples/data_cleaning.py --strategy forward
    python examples/data_cleaning.py --data-dir FOLDER_WITH_MNIST

The data are scikit-learn's 1,797 handwritten digits, or MNIST. Franceschi et al. (ICML 2017), section 5.1; FSLA
(arXiv 2112.04660), section 6.2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import auroc

import report
from datasets import find_mnist, load_digits, load_mnist
from lightning_bilevel import (
    SGD,
    BilevelModule,
    EpisodeLoader,
    FirstOrder,
    ForwardGradient,
    ReverseUnroll,
    TruncatedReverse,
)

STRATEGIES = {
    "reverse": lambda: ReverseUnroll(),
    "checkpointed": lambda: ReverseUnroll(checkpoint="sqrt"),
    "truncated": lambda: TruncatedReverse(steps=1),
    "forward": lambda: ForwardGradient(num_directions=64),
    "first-order": lambda: FirstOrder(),  # zero here: the weights act through the inner loss only
}


class DataCleaning(BilevelModule):
    """A net (inner) and a weight for each training example (outer).

    Args:
        num_examples: training examples.
        num_pixels: of an image.
        inner_steps: steps of the net for each step of the weights.
        inner_lr: learning rate of the net.
        outer_lr: learning rate of the logits of the weights.
    """

    def __init__(
        self,
        num_examples: int = 900,
        num_pixels: int = 64,
        inner_steps: int = 5,
        inner_lr: float = 0.5,
        outer_lr: float = 0.1,
    ) -> None:
        super().__init__(inner_steps=inner_steps, inner_start="warm")
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 64), nn.ReLU(), nn.Linear(64, 10))
        self.logits = nn.Parameter(torch.zeros(num_examples))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def inner_parameters(self):
        return self.net

    def outer_parameters(self):
        return [self.logits]

    def inner_loss(self, batch):
        x, y, index = batch
        return (self.logits[index].sigmoid() * F.cross_entropy(self.net(x), y, reduction="none")).mean()

    def outer_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_inner_optimizer(self):
        return SGD(lr=self.hparams.inner_lr)

    def configure_optimizers(self):
        return torch.optim.Adam([self.logits], lr=self.hparams.outer_lr)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy(self.net(x), y)
        self.log("test_accuracy", self.accuracy, prog_bar=True)


class CleaningData(pl.LightningDataModule):
    """Handwritten digits, part of whose training labels are wrong.

    Lightning's validation loop gets the test images, to watch: nothing is chosen by them.

    Args:
        data_dir: folder with the four MNIST files; by default the digits of scikit-learn are taken.
        corruption: share of the training labels that is replaced by another digit.
        num_train: examples for the inner level.
        num_validation: examples with right labels for the outer level.
        batch_size: examples in a batch, of any kind; with at least all of them, a batch is the whole set.
        inner_batches: training batches for each step of the weights.
        seed: fixes the split and the wrong labels.
    """

    def __init__(
        self,
        data_dir: str | Path | None = None,
        corruption: float = 0.5,
        num_train: int = 900,
        num_validation: int = 397,
        batch_size: int = 1000,
        inner_batches: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        args = self.hparams
        split = load_mnist(args.data_dir) if args.data_dir else load_digits(args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(split.train_y), generator=generator)
        train, validation = order.tensor_split([args.num_train])[0], order[args.num_train :][: args.num_validation]
        y = split.train_y[train]
        self.is_wrong = torch.randperm(len(y), generator=generator) < round(args.corruption * len(y))
        other = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
        self.train = TensorDataset(split.train_x[train], torch.where(self.is_wrong, other, y), torch.arange(len(y)))
        self.validation = TensorDataset(split.train_x[validation], split.train_y[validation])
        self.test = TensorDataset(split.test_x, split.test_y)

    def train_dataloader(self) -> EpisodeLoader:
        inner, outer = self.loader(self.train, RandomSampler), self.loader(self.validation, RandomSampler)
        return EpisodeLoader(inner=inner, outer=outer, inner_batches=self.hparams.inner_batches)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.test, SequentialSampler)

    def loader(self, dataset: TensorDataset, order: type[RandomSampler] | type[SequentialSampler]) -> DataLoader:
        """Return a loader that takes a batch from the tensors at once, not example by example."""
        sampler = BatchSampler(order(dataset), self.hparams.batch_size, drop_last=False)
        return DataLoader(dataset, sampler=sampler, batch_size=None)
