"""Fits of the benchmarks: a Trainer that does nothing beside, and a stopwatch for its steps."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl


def fit(module: pl.LightningModule, data: Any, *callbacks: pl.Callback, **options: Any) -> None:
    """Train on the CPU with a Trainer that writes, shows and validates nothing.

    Args:
        module: what is trained.
        data: what it is trained on.
        *callbacks: a strategy, and what looks on.
        **options: of the Trainer.
    """
    nothing = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = {**dict.fromkeys(nothing, False), "limit_val_batches": 0, "num_sanity_val_steps": 0}
    pl.Trainer(callbacks=list(callbacks), accelerator="cpu", **{**quiet, **options}).fit(module, data)


class Stopwatch(pl.Callback):
    """CPU seconds of the process at the start of each batch, and those that each batch takes."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.process_time())

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.starts[-1])
