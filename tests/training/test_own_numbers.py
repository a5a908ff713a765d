"""A fit's own numbers reach Trainer, loggers and callbacks as `self.log` would bring them there."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers.logger import DummyLogger

from lightning_bilevel import ReverseUnroll
from lightning_bilevel.training.own_numbers import OwnNumbers
from tests.support.modules import Cleaning, loader, trainer
from tests.support.seeds import seeded


class Everything(Callback):
    """Notes all that a Trainer says of numbers, at every batch and at the end of every epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def _note(self, trainer: Any, *_: Any) -> None:
        kinds = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
        self.seen.append({kind: {k: float(v) for k, v in getattr(trainer, kind).items()} for kind in kinds})

    on_train_batch_end = on_train_epoch_end = on_validation_epoch_end = _note


class Kept(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})


class LogsElsewhere(Cleaning):
    """Logs from other hooks, before, between and after the steps."""

    def on_train_epoch_start(self) -> None:
        self.log("epoch", float(self.current_epoch))

    def on_train_batch_start(self, batch: Any, number: int) -> None:
        self.log("number", float(number))

    def on_train_epoch_end(self) -> None:
        self.log("outer_loss", torch.tensor(1.0))

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("outer_loss", torch.tensor(2.0))


def plain_log(self: OwnNumbers, numbers: Any, batch_size: int, *, prog_bar: bool = False) -> None:
    for name, value in numbers.items():
        self._module.log(name, value, prog_bar=prog_bar, batch_size=batch_size)


def fitted(make: Any, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    everything, logger = Everything(), Kept()
    module = seeded(make)
    settings = {"max_steps": -1, "max_epochs": 3, "log_every_n_steps": 1, "enable_progress_bar": True, **options}
    val = torch.utils.data.DataLoader([torch.zeros(1)]) if make is LogsElsewhere else None
    runner = trainer(ReverseUnroll(), everything, logger=logger, **settings)
    runner.fit(module, loader(), val_dataloaders=val)
    return everything.seen, logger.rows


@pytest.mark.parametrize("make", [Cleaning, LogsElsewhere])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 3}])
def test_all_numbers_are_those_of_self_log(make, options):
    with patch.object(OwnNumbers, "log", plain_log):
        expected = fitted(make, **options)
    assert fitted(make, **options) == expected
    assert len({row["callback_metrics"]["outer_loss"] for row in expected[0]}) > 2


def test_most_numbers_do_not_go_through_self_log():
    calls: list[str] = []

    class Counted(Cleaning):
        def log(self, name: str, value: Any, **options: Any) -> None:
            calls.append(name)
            super().log(name, value, **options)

    with patch.object(OwnNumbers, "_is_lightnings", lambda self: True):
        trainer(ReverseUnroll(), max_epochs=3).fit(seeded(Counted), loader())
    counts = {name: calls.count(name) for name in calls}  # of epochs of four steps, the first
    assert counts == {"outer_loss": 3, "inner_loss": 1, "hypergradient_norm": 1}


class OwnLog(Cleaning):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def log(self, name: str, value: Any, **options: Any) -> None:
        self.names.append(name)
        super().log(f"mine/{name}", value, **options)


class OwnLogDict(Cleaning):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def log_dict(self, dictionary: Any, **options: Any) -> None:
        self.names += dictionary
        super().log_dict({f"mine/{name}": value for name, value in dictionary.items()}, **options)


@pytest.mark.parametrize("make", [OwnLog, OwnLogDict])
def test_a_log_of_the_modules_own_gets_every_number(make):
    module = seeded(make)
    runner = trainer(ReverseUnroll(), max_steps=4)
    runner.fit(module, loader())
    assert module.names.count("hypergradient_norm") == 4
    assert "mine/hypergradient_norm" in runner.callback_metrics


def test_a_log_put_on_the_instance_in_the_middle_of_a_fit_gets_the_numbers():
    names: list[str] = []

    class Put(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if number == 1:
                module.log = lambda name, value, **options: names.append(name)

    module = seeded(Cleaning)
    trainer(ReverseUnroll(), Put(), max_steps=3).fit(module, loader())
    assert names


def test_a_second_fit_begins_anew():
    module = seeded(Cleaning)
    for _ in range(2):
        runner = trainer(ReverseUnroll(), max_steps=3)
        runner.fit(module, loader())
        assert torch.isfinite(runner.callback_metrics["hypergradient_norm"])
