"""Fits that are watched: what a function of the module gave before each step, and what was logged after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback
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


def fit(strategy: HypergradientStrategy, *callbacks: Callback, module: Any = None, **options: Any) -> Any:
    """Fit and return the trainer; its module is ``trainer.lightning_module``."""
    running = trainer(strategy, *callbacks, **{k: v for k, v in options.items() if k != "ckpt_path"})
    with forked(1):
        running.fit(module or Fit(), listed(EPISODES), ckpt_path=options.get("ckpt_path"))
    return running
