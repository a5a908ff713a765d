"""Fits that are watched: what a function of the module gave before each step, and what was logged after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import nn

from lightning_bilevel import Episode, HypergradientStrategy
from tests.support.modules import listed, trainer
from tests.support.problems import Mlp, episodes
from tests.support.seeds import forked


class Fit(Mlp):
    """Something to fit, in float64."""

    def __init__(self, dropout: float = 0.0, **options: Any) -> None:
        super().__init__("momentum", inner_start="warm", **options)
        if dropout:
            self.net.first.register_forward_hook(lambda module, inputs, output: nn.functional.dropout(output, dropout))

    def configure_optimizers(self):
        return torch.optim.SGD(self.outer_parameters(), lr=0.3)


EPISODES = episodes(6)


class Before(Callback):
    """Calls a function of (module, episode) before every training step, and reads the metrics after it."""

    def __init__(self, call: Callable[[Any, Episode], Any] = lambda module, episode: None) -> None:
        self.call, self.values, self.metrics = call, [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Episode, batch_idx: int) -> None:
        self.values.append(self.call(pl_module, batch))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.metrics.append({name: value.clone() for name, value in trainer.callback_metrics.items()})

    def logged(self, name: str) -> list[float]:
        return [metrics[name].item() for metrics in self.metrics]


class SaveAt(Callback):
    """Writes a checkpoint in ``hook`` once the module has ``seen`` so many batches."""

    def __init__(self, path: Path, batches: int, hook: str) -> None:
        self.path, self.batches = path, batches
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if len(pl_module.seen) == self.batches:
            trainer.save_checkpoint(self.path)


def fit(
    strategy: HypergradientStrategy,
    *callbacks: Callback,
    module: Any = None,
    batches: Any = EPISODES,
    seed: int = 1,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    """Fit under a seed and return the Trainer.

    Args:
        strategy: estimates the hypergradients.
        callbacks: run along.
        module: what is fitted, at first a new :class:`Fit`; afterwards ``Trainer.lightning_module``.
        batches: a loader, or a list of training batches.
        seed: of the global generator, which is afterwards as it was.
        ckpt_path: a checkpoint to go on from.
        options: of the Trainer.
    """
    running = trainer(strategy, *callbacks, **options)
    with forked(seed):
        data = listed(batches) if isinstance(batches, list) else batches
        running.fit(module or Fit(), data, ckpt_path=ckpt_path)
    return running
