"""What a Trainer offers: limits, loggers, callbacks, averaged weights, evaluation."""

from __future__ import annotations

import csv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from packaging.version import Version
from pytorch_lightning import callbacks as lightning_callbacks
from pytorch_lightning.callbacks import (
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_bilevel import ReverseUnroll
from tests.support.modules import Calls, Cleaning, differing, examples, loader, parameters, trainer
from tests.support.seeds import seeded

LIGHTNING = Version(version("pytorch-lightning"))


@pytest.mark.parametrize(
    ("options", "estimates"),
    [
        ({}, 4),
        ({"limit_train_batches": 3}, 3),
        ({"limit_train_batches": 0.5, "max_epochs": 2}, 4),
        ({"overfit_batches": 1, "max_epochs": 3}, 3),
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 2}, 2),
        ({"max_steps": 3}, 3),
        ({"max_time": {"milliseconds": 1e-3}}, 1),
        ({"accumulate_grad_batches": 3}, 4),
        ({"barebones": True}, 4),
    ],
    ids=str,
)
def test_limits(options, estimates):
    module = Cleaning()
    trainer(ReverseUnroll(), **options).fit(module, loader())
    assert len(module.values) == estimates


def test_overfitting_repeats_one_episode():
    calls = Calls(lambda module: module.outer_batch)

    class Module(Cleaning):
        def outer_loss(self, batch):
            self.outer_batch = batch[0]
            return super().outer_loss(batch)

    trainer(ReverseUnroll(), calls, overfit_batches=1, max_epochs=3).fit(Module(), loader())
    assert len(calls.seen) == 3
    assert all(torch.equal(calls.seen[0], x) for x in calls.seen)


LOGGED = {"outer_loss", "inner_loss", "hypergradient_norm"}


def test_csv_logger_and_progress_bar(tmp_path):
    bar = {}
    spy = LambdaCallback(on_train_batch_end=lambda trainer, *_: bar.update(trainer.progress_bar_metrics))
    module, logger = Cleaning(), CSVLogger(tmp_path)
    trainer(ReverseUnroll(), spy, logger=logger, log_every_n_steps=1).fit(module, loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["outer_loss"]) for row in rows] == pytest.approx([value.item() for value in module.values])
    assert set(rows[0]) >= LOGGED
    assert set(bar) == {"outer_loss"}


def test_tensorboard_logger(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    trainer(ReverseUnroll(), logger=logger, log_every_n_steps=1).fit(Cleaning(), loader())
    assert list(Path(logger.log_dir).glob("events*"))


def test_model_checkpoint_keeps_the_best_and_loads(tmp_path):
    class Module(Cleaning):
        def __init__(self, inner_steps):
            super().__init__(inner_steps=inner_steps)
            self.save_hyperparameters()

    module = Module(inner_steps=2)
    best = ModelCheckpoint(tmp_path, monitor="outer_loss", every_n_train_steps=1)
    trainer(ReverseUnroll(), best, enable_checkpointing=True).fit(module, loader())
    assert best.best_model_score == min(module.values)
    loaded = Module.load_from_checkpoint(best.best_model_path, weights_only=True)
    assert loaded.inner_steps == 2
    assert differing(parameters(loaded), torch.load(best.best_model_path, weights_only=True)["state_dict"]) == []


def test_early_stopping():
    module = Cleaning()
    stop = EarlyStopping("outer_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    trainer(ReverseUnroll(), stop, max_epochs=5).fit(module, loader())
    assert len(module.values) == 4


def test_learning_rate_monitor(tmp_path):
    monitor = LearningRateMonitor(logging_interval="step")
    trainer(ReverseUnroll(), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(Cleaning(), loader())
    assert monitor.lrs == {"lr-Adam": [0.05] * 4}


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_the_outer_loss(bar, capsys):
    if bar is RichProgressBar and LIGHTNING < Version("2.5") and Version(version("rich")) >= Version("14.1"):
        pytest.skip("needs a newer Lightning, or an older rich")
    trainer(ReverseUnroll(), bar(), enable_progress_bar=True).fit(Cleaning(), loader())
    assert "outer_loss" in "".join(capsys.readouterr())


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging(first):
    if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
        pytest.skip("needs a newer Lightning")
    averaging = lightning_callbacks.EMAWeightAveraging(decay=0.5)
    module = Cleaning()
    calls = Calls(parameters)
    callbacks = [ReverseUnroll(), averaging] if first else [averaging, ReverseUnroll()]
    start = parameters(module)
    trainer(*callbacks, calls).fit(module, loader())
    # Copied after the first step, averaged after each later one.
    expected = calls.seen[0]
    for later in calls.seen[1:]:
        expected = {name: 0.5 * value + 0.5 * later[name] for name, value in expected.items()}
    assert differing(start, parameters(module))
    for name, value in parameters(module).items():
        torch.testing.assert_close(value, expected[name])


def test_stochastic_weight_averaging():
    module, calls = Cleaning(), Calls(parameters)
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    trainer(averaging, ReverseUnroll(), calls, max_epochs=4).fit(module, loader())
    starts = [calls.seen[i] for i in (3, 7, 11)]  # of the epochs from the second on
    for name, value in parameters(module).items():
        torch.testing.assert_close(value, sum(start[name] for start in starts) / 3)


class Evaluated(Cleaning):
    """Counts validation and test batches and keeps a metric over them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.error = torchmetrics.MeanSquaredError()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.error(self.net(batch[0]), batch[1])
        self.log("error", self.error, on_epoch=True)

    test_step = validation_step


def evaluation(size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(2)[:2]), batch_size=size)


def test_validation_during_a_fit_with_a_metric_and_sanity_checking():
    module, fit = Evaluated(), trainer(ReverseUnroll(), num_sanity_val_steps=2, max_epochs=2)
    errors: list[float] = []
    spy = LambdaCallback(
        on_validation_epoch_end=lambda trainer, module: errors.append(trainer.callback_metrics["error"].item())
    )
    fit.callbacks.append(spy)
    fit.fit(module, loader(), evaluation())
    assert len(errors) == 3
    x, y, _ = examples(2)
    with torch.no_grad():
        expected = (module.net(x) - y).square().mean().item()
    assert fit.callback_metrics["error"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("run", ["validate", "test"])
def test_validate_and_test_before_and_after_fit(run):
    module, fit = seeded(Evaluated), trainer(ReverseUnroll(), max_epochs=2)
    alone = seeded(Evaluated)
    [before] = getattr(fit, run)(module, evaluation(), verbose=False)
    fit.fit(module, loader())
    [after] = getattr(fit, run)(module, evaluation(), verbose=False)
    assert before["error"] != after["error"]
    trainer(ReverseUnroll(), max_epochs=2).fit(alone, loader())
    assert differing(parameters(module), parameters(alone)) == []  # evaluation leaves no trace
    # A module is evaluated without a strategy in sight, too.
    assert getattr(trainer(), run)(module, evaluation(), verbose=False) == [after]
