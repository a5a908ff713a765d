"""What a module logs in its losses reaches the Trainer once a step."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from lightning_bilevel import (
    PZOBO,
    BilevelModule,
    ForwardGradient,
    GammaGreedy,
    HypergradientMonitor,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
)
from lightning_bilevel.modules.metrics import Later
from lightning_bilevel.modules.recorder import LogRecorder
from tests.support.modules import Cleaning, Maml, listed, loader, tasks, trainer
from tests.support.seeds import seeded


class Logging:
    """Logs in both losses."""

    def inner_loss(self, batch: Any) -> Tensor:
        loss = super().inner_loss(batch)
        self.log("inner", loss, on_step=True, on_epoch=True)
        return loss

    def outer_loss(self, batch: Any) -> Tensor:
        loss = super().outer_loss(batch)
        self.log_dict({"outer": loss, "number": 1.0}, on_step=True, on_epoch=True, prog_bar=True)
        return loss


class LoggingCleaning(Logging, Cleaning):
    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates.append(self.log_lr.exp().item())

    def configure_inner_optimizer(self) -> Any:
        self.log("rate", self.log_lr.exp())
        return super().configure_inner_optimizer()


class LoggingMaml(Logging, Maml):
    outer_loss = Logging.outer_loss


def monitored() -> Any:
    return HypergradientMonitor(every_n_steps=1), TruncatedReverse()


LOG_CASES: dict[str, tuple[Callable[[], BilevelModule], Callable[[], Any], Any]] = {
    "reverse": (LoggingCleaning, ReverseUnroll, None),
    "monitored": (LoggingCleaning, monitored, None),
    "recomputed": (LoggingCleaning, lambda: ReverseUnroll(checkpoint=1), None),
    "double backward": (LoggingCleaning, lambda: ForwardGradient(num_directions=2, chunk_size=1), None),
    "forward": (LoggingCleaning, lambda: ForwardGradient(num_directions=2, mode="forward"), None),
    "every step judged": (LoggingCleaning, GammaGreedy, None),
    "guided": (LoggingCleaning, lambda: ForwardGradient(num_directions=2, guide=GammaGreedy()), None),
    "perturbed": (LoggingCleaning, lambda: PZOBO(num_directions=2, mu=0.3), None),
    "perturbed one by one": (LoggingCleaning, lambda: ZerothOrder(num_directions=2, mu=0.3, chunk_size=1), None),
    "stacked": (LoggingMaml, ReverseUnroll, [tasks(3)] * 4),
    "stacked, every step judged": (LoggingMaml, GammaGreedy, [tasks(3)] * 4),
    "looped, every step judged": (lambda: LoggingMaml(episode_chunk_size=1), GammaGreedy, [tasks(3)] * 4),
    "stacked forward": (LoggingMaml, lambda: ForwardGradient(num_directions=2, mode="forward"), [tasks(3)] * 4),
    "looped": (lambda: LoggingMaml(episode_chunk_size=1), ReverseUnroll, [tasks(3)] * 4),
}


@pytest.mark.parametrize("name", LOG_CASES)
def test_log_inside_losses_logs_once_a_step(name, tmp_path):
    build, strategy, batches = LOG_CASES[name]
    callbacks = strategy()
    callbacks = callbacks if isinstance(callbacks, tuple) else (callbacks,)
    module, fit = build(), trainer(*callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    fit.fit(module, listed(batches) if batches else loader())
    with open(Path(fit.logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["outer_step"]]
    assert len(steps) == 4
    for name, own in (("inner_step", "inner_loss"), ("outer_step", "outer_loss")):
        values = [float(row[name]) for row in steps]
        assert values == pytest.approx([float(row[own]) for row in steps], rel=1e-5)
        epoch = fit.callback_metrics[name.replace("step", "epoch")]
        assert epoch.item() == pytest.approx(sum(values) / 4, rel=1e-5)  # the mean over steps, not over inner steps
    assert fit.callback_metrics["number_epoch"] == 1
    if isinstance(module, LoggingCleaning):
        assert [float(row["rate"]) for row in steps] == pytest.approx(module.rates)


def test_log_in_validation_does_not_reach_the_training_step():
    class Module(Cleaning):
        def validation_step(self, batch, batch_idx):
            with self.adapted(batch.inner):
                self.log("adapted", self.outer_loss(batch.outer), batch_size=1)

        def inner_loss(self, batch):
            self.log(f"training {self.training}", 1.0)
            return super().inner_loss(batch)

    episode = next(iter(loader()))
    fit = trainer(ReverseUnroll(), val_check_interval=2)
    fit.fit(Module(), loader(), listed([episode]))
    assert "training True" in fit.callback_metrics
    assert "training False" not in fit.callback_metrics


def test_what_is_logged_apart_does_not_count():
    module, recorder, seen = Cleaning(), LogRecorder(), []
    with recorder.recording(module):
        recorder.begin()
        module.log("kept", 1.0)
        with recorder.apart(lambda name, value, **options: seen.append((name, value, options))):
            module.log("apart", 2.0, prog_bar=True)
            module.log_dict({"too": 3.0})
        observed = recorder.observe()
    assert seen == [("apart", 2.0, {"prog_bar": True}), ("too", 3.0, {})]
    assert list(observed.calls) == ["kept"]


def test_metrics_apart_are_called_in_another_way():
    module, recorder, seen = Cleaning(), LogRecorder(), []
    assert recorder.metrics == ()
    assert recorder.counted == {}
    module.mean = torchmetrics.MeanMetric()
    later = Later(0)
    with recorder.recording(module):
        recorder.begin()
        assert recorder.metrics == (id(module.mean),)
        with recorder.apart(lambda *args: seen.append(args), lambda metric, name: lambda *args: later):
            module.log_dict(module.mean(torch.ones(2)))
        with recorder.apart(lambda *args: seen.append(args)), recorder.evaluation():
            module.log("mean", module.mean(torch.ones(2)))
        assert recorder.counted[0]["weight"] == 0
        with recorder.evaluation():
            module.mean(torch.ones(2))
        assert recorder.counted[0]["weight"] == 2
    assert seen[0][0] is seen[0][1] is later
    assert seen[1] == ("mean", torch.tensor(1.0))


# --- Names that are logged twice ---


class Both(Cleaning):
    """Logs one name in both losses, and names of this package with options of its own."""

    def inner_loss(self, batch: Any) -> Tensor:
        loss = super().inner_loss(batch)
        self.log_dict({"loss": loss, "inner_loss": loss}, on_epoch=True)
        return loss

    def outer_loss(self, batch: Any) -> Tensor:
        loss = super().outer_loss(batch)
        self.log("loss", loss)
        self.log("outer_loss", loss, on_step=True, on_epoch=True)
        return loss


@pytest.mark.parametrize("strategy", [ReverseUnroll(), ForwardGradient(2, mode="forward")], ids=["reverse", "forward"])
def test_of_a_name_in_both_losses_the_level_is_said_once(strategy: Any, caplog: pytest.LogCaptureFixture) -> None:
    fit = trainer(strategy)
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "pytorch_lightning"):
        fit.fit(Both(), loader())
    said = [record.getMessage() for record in caplog.records if "Both losses log" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("Both losses log `loss`: what is logged is the value of the outer loss, at θ_T")
    assert fit.callback_metrics["loss"] == fit.callback_metrics["outer_loss_step"]


def test_a_name_of_ours_that_a_loss_logs_is_the_loss_s() -> None:
    fit, plain = trainer(ReverseUnroll()), trainer(ReverseUnroll())
    fit.fit(seeded(Both), loader())
    plain.fit(seeded(Cleaning), loader())
    assert {"inner_loss_epoch", "outer_loss_epoch", "hypergradient_norm"} <= set(fit.callback_metrics)
    for name in ("inner_loss", "outer_loss", "hypergradient_norm"):
        found = fit.callback_metrics.get(f"{name}_step", fit.callback_metrics[name])
        assert found.item() == pytest.approx(plain.callback_metrics[name].item())
