"""Numbered tasks, a module that records which it is given, and fits of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bilevel import SGD, BilevelModule, Episode, FirstOrder, HypergradientStrategy
from lightning_bilevel.few_shot import TaskDataset, TaskLoader
from tests.support.modules import trainer


def examples(classes: int = 7, each: int = 6) -> tuple[Tensor, Tensor]:
    """Return images of 3×3 whose every pixel says which example it is, in a mixed order, and their labels."""
    numbers = torch.randperm(classes * each, generator=torch.Generator().manual_seed(0))
    return numbers[:, None, None].expand(-1, 3, 3).float(), numbers % classes


class Numbers(TaskDataset):
    """Tasks that are one drawn number."""

    def draw(self, generator: torch.Generator) -> Episode:
        x = torch.rand(1, generator=generator)
        return Episode([x], x)


def same_numbers(a: list[Episode], b: list[Episode]) -> bool:
    return [float(task.outer) for task in a] == [float(task.outer) for task in b]


class Recorder(BilevelModule):
    """Records the numbers of the tasks it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[float]] = []
        self.validated: list[list[float]] = []

    def inner_parameters(self):
        return [self.weight]

    def outer_parameters(self):
        return [self.weight]

    def inner_loss(self, batch):
        return (self.weight * batch).square().sum()

    def outer_loss(self, batch):
        return ((self.weight - 1) * batch).square().sum()

    def configure_inner_optimizer(self):
        return SGD(lr=0.1)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append([float(task.outer) for task in batch])


class Validated(Recorder):
    """Records those of validation as well."""

    def validation_step(self, batch, batch_idx):
        self.validated.append([float(task.outer) for task in batch])


def fit(
    loader: TaskLoader,
    ckpt_path: Path | None = None,
    callbacks: Any = (),
    val: TaskLoader | None = None,
    hypergradient: HypergradientStrategy | None = None,
    module: Recorder | None = None,
    **options: Any,
) -> Recorder:
    module = module or (Recorder() if val is None else Validated())
    options = {"num_sanity_val_steps": 0, "max_epochs": None, **options}
    trainer(hypergradient or FirstOrder(), *callbacks, **options).fit(module, loader, val, ckpt_path=ckpt_path)
    return module
