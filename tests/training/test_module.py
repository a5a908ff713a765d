"""A fit of a bilevel module in a real Trainer: its numbers, and everything that a Trainer offers."""

from __future__ import annotations

import copy
import csv
import signal
from collections.abc import Callable, Iterable
from importlib.metadata import version
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from packaging.version import Version
from pytorch_lightning import LightningDataModule, Trainer, seed_everything
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bilevel import (
    PZOBO,
    SGD,
    Adam,
    BilevelModule,
    Episode,
    EpisodeLoader,
    ForwardGradient,
    GammaGreedy,
    HypergradientMonitor,
    ImplicitGradient,
    ReverseUnroll,
    TruncatedReverse,
    ZerothOrder,
    hypergradient,
)
from lightning_bilevel.linear_solvers import Dense
from tests.support.modules import (
    Calls,
    Cleaning,
    Maml,
    differing,
    episodes_of,
    examples,
    functional_net,
    identical,
    listed,
    loader,
    parameters,
    seeded,
    tasks,
    trainer,
)

LIGHTNING = Version(version("pytorch-lightning"))

# ---------------------------------------------------------------------------------------------------------------------
# The numbers
# ---------------------------------------------------------------------------------------------------------------------


def cleaning_by_hand(
    module: Cleaning,
    episodes: Iterable[Episode],
    steps: int,
    accumulate: int = 1,
    clip: Callable[[list[Tensor]], Any] = lambda outer: None,
    schedule: Callable[[Any], Any] | None = None,
    every: int = 1,
) -> list[Tensor]:
    """Train as ``Trainer.fit(Cleaning())`` does: warm start, momentum, Adam outside; with torch alone.

    Args:
        module: supplies the starting values and receives the final ones.
        episodes: the data.
        steps: outer steps.
        accumulate: episodes per outer step.
        clip: clips the gradients of the parameters that it gets.
        schedule: from the outer optimizer to a learning rate scheduler.
        every: outer steps per step of the scheduler.
    """
    outer = [module.example_weights.detach().requires_grad_(), module.log_lr.detach().requires_grad_()]
    optimizer = torch.optim.Adam(outer, lr=0.05)
    scheduler = schedule(optimizer) if schedule else None
    theta = [p.detach() for p in module.net.parameters()]
    momentum = [torch.zeros_like(p) for p in theta]
    source, values, first = iter(episodes), [], True
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for inner, (outer_x, outer_y) in islice(source, accumulate):
            theta = [p.detach().requires_grad_() for p in theta]
            momentum = [m.detach() for m in momentum]
            for t in range(3):
                x, y, index = inner[t % len(inner)]
                loss = (outer[0][index].sigmoid() * (functional_net(theta, x) - y).square().mean(1)).mean()
                grads = torch.autograd.grad(loss, theta, create_graph=True)
                momentum = [g if first else torch.add(g, m, alpha=0.9) for g, m in zip(grads, momentum, strict=True)]
                descent = -outer[1].exp()
                theta = [torch.addcmul(p, m, descent) for p, m in zip(theta, momentum, strict=True)]
                first = False
            value = (functional_net(theta, outer_x) - outer_y).square().mean()
            (value / accumulate).backward()
            values.append(value.detach())
        clip(outer)
        optimizer.step()
        if scheduler and step % every == 0:
            scheduler.step()
    for p, value in zip(module.net.parameters(), theta, strict=True):
        p.data.copy_(value)
    return values


def step_scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


NORM, VALUE = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_
EQUALITIES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    # Trainer arguments, interval of the learning rate scheduler, arguments of the loop by hand
    "plain": ({}, None, {}),
    "accumulate": ({"accumulate_grad_batches": 2}, None, {"accumulate": 2, "steps": 4}),
    "clip norm": ({"gradient_clip_val": 1e-3}, None, {"clip": lambda outer: NORM(outer, 1e-3)}),
    "clip value": (
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        None,
        {"clip": lambda outer: VALUE(outer, 1e-3)},
    ),
    "schedule steps": ({}, "step", {"schedule": step_scheduler}),
    "schedule epochs": ({}, "epoch", {"schedule": step_scheduler, "every": 4}),
    "double": ({"precision": "64-true"}, None, {}),
    "anomaly mode": ({"detect_anomaly": True}, None, {}),
}


@pytest.mark.parametrize("name", EQUALITIES)
def test_fit_equals_a_loop_by_hand_bit_for_bit(name):
    options, interval, by_hand = EQUALITIES[name]

    class Module(Cleaning):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.outer_parameters(), lr=0.05)
            if interval is None:
                return optimizer
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": step_scheduler(optimizer), "interval": interval},
            }

    module, expected = seeded(Module), seeded(Module)
    dtype = torch.float64 if name == "double" else torch.float32
    episodes = islice(episodes_of(loader()), 8)
    to = lambda batch: tuple(value.to(dtype) if value.is_floating_point() else value for value in batch)  # noqa: E731
    values = cleaning_by_hand(
        expected.to(dtype),
        (Episode([to(batch) for batch in episode.inner], to(episode.outer)) for episode in episodes),
        **{"steps": 8, **by_hand},
    )
    trainer(ReverseUnroll(), max_epochs=2, **options).fit(module, loader())
    assert module.net[0].weight.dtype == dtype
    assert torch.equal(torch.stack(module.values), torch.stack(values))
    assert differing(parameters(module), parameters(expected)) == []


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_maml_equals_a_loop_by_hand(chunk_size):
    module = seeded(lambda: Maml(episode_chunk_size=chunk_size)).double()
    outer = [p.detach().clone().requires_grad_() for p in module.net.parameters()]
    optimizer = torch.optim.Adam(outer, lr=0.05)
    batches = [tasks(3, dtype=torch.float64)] * 4
    for episodes in batches:
        optimizer.zero_grad()
        for episode in episodes:
            theta = outer
            for _ in range(2):
                loss = (functional_net(theta, episode.inner[0][0]) - episode.inner[0][1]).square().mean()
                grads = torch.autograd.grad(loss, theta, create_graph=True)
                theta = [p - 0.1 * g for p, g in zip(theta, grads, strict=True)]
            ((functional_net(theta, episode.outer[0]) - episode.outer[1]).square().mean() / 3).backward()
        optimizer.step()
    trainer(ReverseUnroll()).fit(module, listed(batches))
    for p, value in zip(module.net.parameters(), outer, strict=True):
        torch.testing.assert_close(p, value, rtol=1e-9, atol=1e-12)


def test_bfloat16_mixed_is_close_to_float32():
    class Module(Cleaning):
        def on_before_optimizer_step(self, optimizer):
            self.gradient = torch.cat([p.grad.reshape(-1) for p in self.outer_parameters()])

    gradients = {}
    for precision in ("32-true", "bf16-mixed"):
        module = seeded(Module)
        fit = trainer(ReverseUnroll(), precision=precision, max_steps=1)
        fit.fit(module, loader())
        assert torch.isfinite(fit.callback_metrics["outer_loss"])
        assert torch.isfinite(fit.callback_metrics["inner_loss"])
        assert module.gradient.dtype == module.net[0].weight.dtype == torch.float32
        gradients[precision] = module.gradient
    assert not torch.equal(*gradients.values())
    assert torch.cosine_similarity(*gradients.values(), dim=0) > 0.99


def test_seed_everything_makes_two_runs_equal_bit_for_bit():
    class Module(Cleaning):
        def __init__(self):
            net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
            super().__init__(net=lambda: net, optimizer=lambda lr: Adam(lr=0.01 * lr))

    def run(seed):
        seed_everything(seed, verbose=False)
        module = Module()
        trainer(ForwardGradient(num_directions=2), max_epochs=2).fit(module, loader(shuffle=True))
        return parameters(module)

    with torch.random.fork_rng():
        first, again, other = run(1), run(1), run(2)
    assert differing(first, again) == []
    assert differing(first, other)


# ---------------------------------------------------------------------------------------------------------------------
# What a Trainer offers
# ---------------------------------------------------------------------------------------------------------------------


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


def test_inner_parameters_are_given_back_where_a_move_makes_new_ones():
    """As on devices whose tensors cannot take the place of the CPU's."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module = seeded(Cleaning)
        for _ in range(2):
            trainer(ReverseUnroll()).fit(module, loader())
            assert all(parameter.requires_grad for parameter in module.parameters())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def test_a_copy_made_during_the_fit_computes_and_lives_on():
    copies = Calls(copy.deepcopy)
    module = seeded(Cleaning)
    trainer(ReverseUnroll(), copies).fit(module, loader())
    episode = next(iter(loader()))
    for clone in copies.seen:
        assert differing(parameters(clone), parameters(module)) or clone is copies.seen[-1]
        assert torch.isfinite(hypergradient(clone, ReverseUnroll(), episode).value)
    again = copies.seen[0]
    again.detach_strategy()
    trainer(ReverseUnroll()).fit(again, loader())


# ---------------------------------------------------------------------------------------------------------------------
# Before, between and after fits
# ---------------------------------------------------------------------------------------------------------------------


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


def test_fitting_twice_goes_on():
    module, fit = seeded(Cleaning), trainer(ReverseUnroll(), max_epochs=1)
    fit.fit(module, loader())
    between = parameters(module)
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader())
    assert len(module.values) == 8
    assert differing(between, parameters(module))
    again = seeded(Cleaning)
    for _ in range(2):
        trainer(ReverseUnroll()).fit(again, loader())
    assert len(again.values) == 8
    assert module._memory.estimates == again._memory.estimates == 4


RESUMED: dict[str, tuple[Callable[[], BilevelModule], Callable[[], Any]]] = {
    "warm, momentum": (Cleaning, ReverseUnroll),
    "warm, Adam": (lambda: Cleaning(optimizer=lambda lr: Adam(lr=0.1 * lr)), ReverseUnroll),
    "random directions": (Cleaning, lambda: ForwardGradient(num_directions=2)),
    "reset": (lambda: Cleaning(inner_start="reset"), lambda: ForwardGradient(num_directions=2)),
    "reinit": (lambda: Cleaning(inner_start="reinit"), lambda: TruncatedReverse(steps=2)),
}


STEPS = {"max_epochs": -1}
SAFELY = {"weights_only": True} if "weights_only" in signature(Trainer.fit).parameters else {}  # Lightning >= 2.6
STOPS = [  # first limits, whole limits, when to save, steps taken by then
    pytest.param({"max_steps": 3, **STEPS}, {"max_steps": 7, **STEPS}, {"every_n_train_steps": 3}, 3, id="mid-epoch"),
    pytest.param({"max_steps": 4, **STEPS}, {"max_steps": 7, **STEPS}, {"every_n_train_steps": 4}, 4, id="epoch"),
    pytest.param({"max_epochs": 1}, {"max_epochs": 2}, {"every_n_epochs": 1}, 4, id="by epochs"),
]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize(("first", "limits", "when", "done"), STOPS)
def test_resuming_equals_going_on_bit_for_bit(name, first, limits, when, done, tmp_path):
    build, strategy = RESUMED[name]

    def run(seed, limits, **options):
        with torch.random.fork_rng():
            seed_everything(seed, verbose=False)
            module, save = build(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
            fit = trainer(strategy(), save, enable_checkpointing=True, **limits)
            fit.fit(module, loader(shuffle=True), **options)
        return module, fit

    run(1, first)
    whole, whole_fit = run(1, limits)
    resumed, resumed_fit = run(2, limits, ckpt_path=tmp_path / f"step={done}.ckpt", **SAFELY)
    assert torch.equal(torch.stack(whole.values[done:]), torch.stack(resumed.values))
    assert differing(parameters(whole), parameters(resumed)) == []
    assert identical(whole.inner_state_dict(), resumed.inner_state_dict())
    assert identical(whole_fit.optimizers[0].state_dict(), resumed_fit.optimizers[0].state_dict())


def test_a_checkpoint_from_elsewhere_is_where_reset_returns_to(tmp_path):
    first = trainer(ReverseUnroll(), max_steps=1)
    first.fit(Cleaning(inner_start="reset"), loader())
    first.save_checkpoint(tmp_path / "own.ckpt")
    checkpoint = torch.load(tmp_path / "own.ckpt", weights_only=True)
    del checkpoint["lightning_bilevel"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    second = Cleaning(inner_start="reset")
    with pytest.warns(UserWarning, match="This checkpoint has no inner state"):
        trainer(ReverseUnroll(), max_steps=2).fit(second, loader(), ckpt_path=tmp_path / "other.ckpt", **SAFELY)
    initial = second.inner_state_dict()["initial"]
    assert initial
    assert all(torch.equal(value, checkpoint["state_dict"][name]) for name, value in initial.items())


# ---------------------------------------------------------------------------------------------------------------------
# Frozen inner parameters
# ---------------------------------------------------------------------------------------------------------------------


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    ("module", "trained"),
    [(Cleaning, {"example_weights", "log_lr"}), (Maml, {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"})],
)
def test_only_outer_parameters_require_gradients_during_a_fit(module, trained):
    module, seen = module(), []
    note = lambda trainer, module, *_: seen.append({name for name, flag in flags(module).items() if flag})  # noqa: E731
    spy = LambdaCallback(on_fit_start=note, on_train_batch_end=note)
    trainer(spy, ReverseUnroll()).fit(module, loader())
    assert seen == [trained] * 5
    assert all(flags(module).values())


class Failing(Cleaning):
    """Raises where it is told to, and has a layer that its user froze."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error = where, error
        self.net[0].requires_grad_(False)

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise self.error

    def setup(self, stage: str) -> None:
        self._fail("setup")

    def configure_optimizers(self) -> Any:
        self._fail("configure_optimizers")
        return super().configure_optimizers()

    def inner_loss(self, batch: Any) -> Tensor:
        if self._attachment.ready and self.global_step == 2:
            self._fail("inner_loss")
        return super().inner_loss((batch[0], batch[1], batch[2]))

    def on_train_end(self) -> None:
        self._fail("on_train_end")


@pytest.mark.parametrize("where", ["setup", "configure_optimizers", "inner_loss", "on_train_end"])
@pytest.mark.parametrize(("error", "raised"), [(RuntimeError("boom"), RuntimeError), (KeyboardInterrupt(), SystemExit)])
def test_an_exception_leaves_the_module_as_it_was(where, error, raised, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning would have later tests ignore Ctrl+C
    module = Failing(where, error)
    before, attributes = flags(module), set(module.__dict__)
    objects = {name: id(parameter) for name, parameter in module.named_parameters()}
    with pytest.raises(raised):
        trainer(ReverseUnroll()).fit(module, loader())
    assert flags(module) == before
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == objects
    assert set(module.__dict__) - {"_hparams"} == attributes  # no hook stays shadowed
    module.where = "nowhere"
    trainer(ReverseUnroll()).fit(module, loader())
    assert flags(module) == before


# ---------------------------------------------------------------------------------------------------------------------
# What a user writes
# ---------------------------------------------------------------------------------------------------------------------


class BuildsLate(Cleaning):
    """Builds its layers in a hook."""

    def __init__(self, hook: str) -> None:
        super().__init__(net=nn.Identity)
        self.hook = hook

    def _build(self, hook: str) -> None:
        if self.hook == hook and isinstance(self.net, nn.Identity):
            self.net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_may_be_built_in_a_hook(hook):
    late, early = BuildsLate(hook), seeded(Cleaning)
    for module in (late, early):
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(parameters(late), parameters(early)) == []
    assert all(flags(late).values())


def test_inner_steps_may_change_during_a_fit():
    class Module(Cleaning):
        def on_train_epoch_start(self):
            self.inner_steps = 1 + self.current_epoch

    calls = Calls(lambda module: module._memory.steps)
    trainer(ReverseUnroll(), calls, max_epochs=2).fit(Module(), loader())
    assert calls.seen == [1, 2, 3, 4, 6, 8, 10, 12]


def test_the_strategy_may_come_from_configure_callbacks():
    class Module(Cleaning):
        def configure_callbacks(self):
            return [ReverseUnroll()]

    module = Module()
    trainer().fit(module, loader())
    assert len(module.values) == 4


def test_the_loader_may_come_from_hooks_or_a_data_module():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

    class Module(Cleaning):
        def train_dataloader(self):
            return loader()

    for module, data in ((Module(), None), (Cleaning(), Data())):
        trainer(ReverseUnroll()).fit(module, datamodule=data)
        assert len(module.values) == 4


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


def test_a_torch_optimizer_inside_equals_the_own_one():
    class Torch(Cleaning):
        def configure_inner_optimizer(self):
            return torch.optim.SGD(self.inner_parameters(), lr=0.1, momentum=0.9)

    class Own(Cleaning):
        def configure_inner_optimizer(self):
            return SGD(lr=0.1, momentum=0.9)

    modules = [seeded(Torch), seeded(Own)]
    for module in modules:
        module.outer_parameters = lambda module=module: [module.example_weights]
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(*map(parameters, modules)) == []


def test_an_outer_optimizer_over_all_parameters_leaves_the_inner_ones_alone():
    class All(Cleaning):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.5)

    class Outer(Cleaning):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.outer_parameters(), lr=0.05, weight_decay=0.5)

    modules = [seeded(All), seeded(Outer)]
    for module in modules:
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(*map(parameters, modules)) == []


class Penalized(BilevelModule):
    """Uses both levels in a loss, and one for the outer optimizer."""

    def __init__(self) -> None:
        super().__init__(inner_steps=2)
        self.net, self.log_penalty = nn.Linear(3, 1), nn.Parameter(torch.zeros(4))

    def inner_loss(self, batch: Any) -> Tensor:
        [log_penalty] = self.outer_parameters()
        penalty = sum((log_penalty.exp() * p.square().mean()).sum() for p in self.inner_parameters())
        return (self.net(batch[0]) - batch[1]).square().mean() + penalty

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.outer_parameters(), lr=0.05)


class NamesInner(Penalized):
    def inner_parameters(self) -> Any:
        return self.net.parameters()


class NamesOuter(Penalized):
    def outer_parameters(self) -> Any:
        return [self.log_penalty]


class NamesBoth(NamesInner, NamesOuter):
    pass


@pytest.mark.parametrize("named", [NamesInner, NamesOuter])
def test_the_other_level_is_all_the_rest_everywhere(named):
    both, one = seeded(NamesBoth), seeded(named)
    episode = next(iter(loader()))
    for strategy in (ReverseUnroll(), TruncatedReverse(), ForwardGradient(num_directions=2, mode="forward")):
        expected, got = (hypergradient(module, strategy, episode) for module in (both, one))
        assert differing(expected.grads, got.grads) == []
    for module in (both, one):
        trainer(ReverseUnroll()).fit(module, loader())
        with module.adapted(episode.inner):
            module.loss = module.inner_loss(episode.inner[0]).item()
    assert differing(*map(parameters, (both, one))) == []
    assert both.loss == one.loss


def test_levels_may_be_lists_of_parameters_and_submodules():
    class Module(Cleaning):
        def inner_parameters(self):
            return [self.net[0], self.net[2].weight, self.net[2].bias]

    modules = [seeded(Module), seeded(Cleaning)]
    for module in modules:
        trainer(ReverseUnroll()).fit(module, loader())
    assert differing(*map(parameters, modules)) == []


def test_a_mapping_of_inner_and_outer_loaders():
    inner, outer = loader().flattened[::-1]
    modules = [seeded(Cleaning), seeded(Cleaning)]
    for module, source in zip(modules, ({"inner": inner, "outer": outer}, EpisodeLoader(inner, outer, 1)), strict=True):
        trainer(ReverseUnroll()).fit(module, source)
    assert differing(*map(parameters, modules)) == []


LISTS = {
    "episodes": lambda: tasks(2),
    "lists of episodes": lambda: [tasks(2), tasks(2)],
    "one episode": lambda: tasks(1)[0],
    "two levels": lambda: {"inner": tasks(1)[0].inner, "outer": listed([tasks(1)[0].outer])},
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_that_lightning_takes_apart_are_refused(name):
    """It would train on single rows of the batches, in silence."""
    module = Maml()
    before = parameters(module)
    with pytest.raises(ValueError, match=r"^Expected `the training data` to be a .*loader.*Lightning takes a list for"):
        trainer(ReverseUnroll()).fit(module, LISTS[name]())
    assert differing(before, parameters(module)) == []


def test_a_mapping_of_several_inner_loaders():
    class Module(Maml):
        def episodes(self, batch):
            return [Episode(batch["inner"], batch["outer"])]

    module = Module()
    inner, outer = [listed([tasks(1)[0].outer] * 2) for _ in range(2)], listed([tasks(1)[0].outer] * 2)
    fit = trainer(ReverseUnroll())
    fit.fit(module, {"inner": inner, "outer": outer})
    assert fit.global_step == 2


class WithoutData(BilevelModule):
    """Its inner minimum is where φ says, whatever the batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(inner_steps=3, inner_start="reset", **options)
        self.theta, self.phi = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def inner_parameters(self) -> Any:
        return [self.theta]

    def inner_loss(self, batch: None) -> Tensor:
        assert batch is None
        return (self.theta - self.phi).square().sum() / 2

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.theta - batch[0].mean(0)).square().sum()

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


class WithoutDataSolved(WithoutData):
    def solve_inner(self, batches: Any) -> Any:
        assert batches == [None]
        return {"theta": self.phi.clone()}


@pytest.mark.parametrize("kind", [WithoutData, WithoutDataSolved])
@pytest.mark.parametrize("strategy", [ReverseUnroll, lambda: ImplicitGradient(Dense())])
def test_an_inner_problem_without_data(kind, strategy):
    module, outer = kind(), [examples(1)[:2]] * 30
    trainer(strategy()).fit(module, EpisodeLoader(inner=[None], outer=outer))
    torch.testing.assert_close(module.phi.detach(), outer[0][0].mean(0), atol=0.01, rtol=0)
    with module.adapted([None]):
        torch.testing.assert_close(module.theta, module.phi)


def test_a_list_of_episodes_of_unequal_shapes_or_with_other_things_in_them():
    class Module(Maml):
        def inner_loss(self, batch):
            assert len(batch) == 2 or batch[2] == "name"
            return super().inner_loss(batch[:2])

        outer_loss = Maml.inner_loss

    def shorter(episode, size):
        return Episode([tuple(x[:size] for x in batch) for batch in episode.inner], episode.outer)

    equal = tasks(4)
    unequal = [shorter(episode, size) for episode, size in zip(equal, (8, 8, 5, 8), strict=True)]
    named = [Episode([(*batch, "name") for batch in episode.inner], episode.outer) for episode in equal]
    results = {}
    for name, episodes in (("equal", equal), ("unequal", unequal), ("named", named)):
        module = seeded(Module)
        trainer(ReverseUnroll()).fit(module, listed([episodes] * 2))
        results[name] = parameters(module)
    for name, value in results["equal"].items():
        torch.testing.assert_close(results["named"][name], value)
    assert differing(results["equal"], results["unequal"])


@pytest.mark.parametrize("sizes", [(3, 3), (1, 3)])
def test_losses_that_cannot_be_vectorized_are_looped(sizes):
    class Branching(Maml):
        def inner_loss(self, batch):
            return super().inner_loss(batch) * (2 if batch[0].sum() > 0 else 1)

    modules = [seeded(Branching), seeded(lambda: Branching(episode_chunk_size=1))]
    batches = [tasks(size) for size in sizes]
    message = "The losses cannot be vectorized over episodes, so the episodes of a batch are looped: "
    with pytest.warns(UserWarning, match=f"^{message}") as caught:
        trainer(ReverseUnroll()).fit(modules[0], listed(batches))
    assert sum(str(warning.message).startswith(message) for warning in caught) == 1
    trainer(ReverseUnroll()).fit(modules[1], listed(batches))
    assert differing(*map(parameters, modules)) == []
