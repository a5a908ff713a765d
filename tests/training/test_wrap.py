"""``bilevel`` makes an unedited LightningModule bilevel: the same numbers as a subclass written by hand."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, callbacks
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_bilevel import (
    SGD,
    Episode,
    ForwardGradient,
    ForwardUnroll,
    HypergradientMonitor,
    ReverseUnroll,
    StrategyAudit,
    bilevel,
    hypergradient,
)
from lightning_bilevel.errors import MisconfigurationError
from tests.support.modules import FEATURES, differing, examples, listed, loader, parameters, tasks, trainer
from tests.support.seeds import seeded
from tests.support.wrapping import ByHand, Manual, Minimal, Plain, maml, named, validation, wrapped

STRATEGIES = [
    ReverseUnroll(),
    ForwardUnroll(),
    ForwardGradient(num_directions=2),
    ForwardGradient(num_directions=2, mode="forward"),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'mode', '')}")
def test_hypergradients_equal_those_of_a_subclass(strategy):
    episode = Episode([examples(0), examples(1)], examples(2)[:2])
    ours, theirs = (hypergradient(m, strategy, episode) for m in (wrapped(), seeded(ByHand)))
    assert torch.equal(ours.value, theirs.value)
    assert not differing({name.removeprefix("module."): g for name, g in ours.grads.items()}, dict(theirs.grads))


@pytest.mark.parametrize("strategy", STRATEGIES[::3], ids=["reverse", "forward"])
def test_a_fit_equals_that_of_a_subclass_bit_for_bit(strategy, tmp_path):
    metrics, modules = [], [wrapped(), seeded(ByHand)]
    for number, module in enumerate(modules):
        logger = CSVLogger(tmp_path, name=str(number))
        fit = trainer(copy.deepcopy(strategy), max_epochs=2, logger=logger, log_every_n_steps=1)
        fit.fit(module, loader(), validation())
        metrics.append((fit.callback_metrics, (tmp_path / str(number) / "version_0" / "metrics.csv").read_text()))
    assert metrics[0] == metrics[1]
    assert {"train_loss", "train_loss_epoch", "val_error", "val_loss", "epoch_end", "outer_loss"} <= set(metrics[0][0])
    ours, theirs = modules
    assert not differing(parameters(ours.module), parameters(theirs))
    assert ours.module.hooks == theirs.hooks == ["epoch 0, step 4, 2 epochs", "epoch 1, step 8, 2 epochs"]


def test_the_module_is_trained_in_place_and_free_again():
    module = seeded(Plain)
    before, identities = parameters(module), [id(p) for p in module.parameters()]
    wrapper = wrapped(module)
    assert wrapper.module is module
    trainer(ReverseUnroll()).fit(wrapper, loader(), validation())
    assert [id(p) for p in module.parameters()] == identities
    changed = differing(parameters(module), before)
    assert {"net.0.weight", "example_weights", "log_lr"} <= set(changed)
    assert all(p.requires_grad for p in module.parameters())
    assert "log" not in vars(module)
    assert module._current_fx_name is None
    batches = DataLoader(TensorDataset(*examples(0)), batch_size=4)
    alone = trainer()
    alone.fit(module, batches, validation())
    assert {"train_loss", "val_error"} <= set(alone.callback_metrics)


SELECTIONS = {
    "name": ("net.0.weight", {"net.0.weight"}),
    "submodule's name": ("net.0", {"net.0.weight", "net.0.bias"}),
    "glob": ("*.bias", {"net.0.bias", "net.1.bias", "net.3.bias"}),
    "submodule": (lambda m: m.net[3], {"net.3.weight", "net.3.bias"}),
    "parameter": (lambda m: m.net[0].bias, {"net.0.bias"}),
    "generator": (lambda m: m.net[3].parameters(), {"net.3.weight", "net.3.bias"}),
    "list": (lambda m: ["net.0.*", m.net[3].bias, m.net[1]], {"net.0.weight", "net.0.bias", "net.3.bias"}),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("level", ["inner", "outer"])
def test_selection(name, level):
    select, expected = SELECTIONS[name]
    expected = expected | ({"net.1.weight", "net.1.bias"} if name == "list" else set())
    module = seeded(Plain)
    chosen = select(module) if callable(select) else select
    wrapper = wrapped(module, **{level: chosen})
    assert named(wrapper, level) == expected
    assert len(getattr(wrapper, f"{level}_parameters")()) == len(expected)
    assert named(copy.deepcopy(wrapper), level) == expected


def test_both_levels_by_default_losses_and_stacked_episodes():
    for strategy in (ReverseUnroll(), ForwardGradient(num_directions=2, mode="forward")):
        wrapper = maml()
        stacked = hypergradient(wrapper, strategy, tasks(3))
        looped = [hypergradient(wrapper, strategy, task) for task in tasks(3)]
        torch.testing.assert_close(stacked.value, sum(one.value for one in looped) / 3)
        for name, grad in stacked.grads.items():
            torch.testing.assert_close(grad, sum(one.grads[name] for one in looped) / 3, atol=1e-6, rtol=1e-4)
        fit = trainer(strategy, logger=False)
        fit.fit(wrapper, listed([tasks(3)] * 2))
        assert torch.equal(fit.callback_metrics["loss"], fit.callback_metrics["outer_loss"])


OPTIMIZERS = {
    "own": SGD(lr=0.1),
    "function of the module": lambda module: SGD(lr=0.1),
    "class": partial(torch.optim.SGD, lr=0.1),
    "function of params": lambda params: torch.optim.SGD(params, lr=0.1),
    "function of the module, torch": lambda module: torch.optim.SGD(module.head.parameters(), lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inner_optimizers(name):
    task = tasks(1)[0]
    results = [
        hypergradient(maml(inner=["head"], outer="body", inner_optimizer=optimizer), ReverseUnroll(), task)
        for optimizer in (OPTIMIZERS[name], SGD(lr=0.1))
    ]
    assert not differing(results[0].grads, results[1].grads)


def test_losses_by_name_equal_the_default():
    results = [
        hypergradient(maml(inner_loss=loss, outer_loss=loss), ReverseUnroll(), tasks(1)[0])
        for loss in (None, "loss", "training_step", lambda module, batch: module.loss(batch))
    ]
    assert all(not differing(result.grads, results[0].grads) for result in results[1:])


SIGNATURES: dict[str, Any] = {
    "underscore": lambda self, batch, _: self.seen(batch, _),
    "any": lambda self, *args: self.seen(*args),
    "default": lambda self, batch, batch_idx=7: self.seen(batch, batch_idx),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_training_step_may_have_any_signature_that_lightning_takes(name):
    class Signed(Minimal):
        training_step = SIGNATURES[name]

        def seen(self, batch: Any, batch_idx: int) -> Tensor:
            assert batch_idx == (self.trainer.fit_loop.batch_idx if self._trainer else 0)
            return self.loss(batch)

    wrapper = bilevel(seeded(Signed), inner="*", outer="*", inner_optimizer=SGD(lr=0.1), inner_steps=2)
    results = [hypergradient(module, ReverseUnroll(), tasks(1)[0]) for module in (wrapper, maml())]
    assert not differing(results[0].grads, results[1].grads)
    trainer(ReverseUnroll()).fit(wrapper, listed(tasks(2)))


def test_another_loss_gets_no_number_that_it_does_not_ask_for():
    class Scaled(Minimal):
        def scaled(self, batch: Any, scale: float = 1.0) -> Tensor:
            return scale * self.loss(batch)

    options = {"inner": "*", "outer": "*", "inner_optimizer": SGD(lr=0.1), "inner_steps": 2}
    wrapper = bilevel(seeded(Scaled), inner_loss="scaled", outer_loss="scaled", **options)
    results = [hypergradient(module, ReverseUnroll(), tasks(1)[0]) for module in (wrapper, maml())]
    assert not differing(results[0].grads, results[1].grads)


def test_a_method_of_the_module_is_a_loss_also_in_a_copy():
    module = seeded(Minimal)
    wrapper = bilevel(module, inner="*", outer="*", outer_loss=module.loss, inner_optimizer=SGD(lr=0.1), inner_steps=2)
    copied = copy.deepcopy(wrapper)
    before = hypergradient(wrapper, ReverseUnroll(), tasks(1)[0]).grads
    with torch.no_grad():
        module.head.weight.zero_()
    assert not differing(hypergradient(copied, ReverseUnroll(), tasks(1)[0]).grads, before)


def test_a_module_that_optimizes_manually_is_taken_with_both_losses():
    fitted = [seeded(build) for build in (Manual, Minimal)]
    for module in fitted:
        losses = {"inner_loss": "loss", "outer_loss": "loss"}
        wrapper = bilevel(module, inner="head", outer="body", inner_optimizer=SGD(lr=0.1), **losses)
        trainer(ReverseUnroll()).fit(wrapper, loader())
    assert differing(parameters(fitted[0]), parameters(seeded(Minimal)))
    assert not differing(parameters(fitted[0]), parameters(fitted[1]))
    assert not fitted[0].automatic_optimization


def test_the_trainer_of_a_fit_evaluates_the_module_itself(tmp_path):
    wrapper = wrapped()
    callbacks = ReverseUnroll(), HypergradientMonitor(), StrategyAudit([ReverseUnroll()])
    fit = trainer(*callbacks)
    fit.fit(wrapper, loader(), validation())
    after = parameters(wrapper.module)
    fit.validate(wrapper, validation(), verbose=False)
    expected = fit.callback_metrics["val_loss"]
    fit.validate(wrapper.module, validation(), verbose=False)
    assert torch.equal(fit.callback_metrics["val_loss"], expected)
    fit.save_checkpoint(tmp_path / "module.ckpt")
    checkpoint = torch.load(tmp_path / "module.ckpt", weights_only=True)
    assert "lightning_bilevel" not in checkpoint
    assert not differing(checkpoint["state_dict"], after)
    fit.validate(seeded(Plain, 5), validation(), ckpt_path=tmp_path / "module.ckpt", verbose=False)
    assert torch.equal(fit.callback_metrics["val_loss"], expected)


class Curious(Minimal):
    """Looks at the Trainer in its training step, overrides ``log``, and changes batches on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.add((batch_idx, self.current_epoch, self.global_step, self.device.type, self.trainer.max_epochs))
        return super().training_step(batch)

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(f"my_{name}", *args, **kwargs)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]

    def val_dataloader(self) -> Any:
        return validation()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch[0].mean())

    def configure_callbacks(self) -> Any:
        return [ReverseUnroll()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.add("load")


def test_what_a_module_sees_and_overrides():
    module = seeded(Curious)
    wrapper = bilevel(module, inner="head", outer="body", inner_optimizer=SGD(lr=0.1))
    fit = trainer()
    fit.fit(wrapper, loader())
    assert module.seen == {(step, 0, step, "cpu", 1) for step in range(4)}
    assert {"my_loss", "my_val", "my_outer_loss"} <= set(fit.callback_metrics)
    assert "loss" not in fit.callback_metrics
    expected = torch.cat([batch[0] for batch in validation()]).mean() + 1
    torch.testing.assert_close(fit.callback_metrics["my_val"], expected)


def test_lightning_is_told_what_the_module_overrides():
    for module in (seeded(Plain), seeded(Minimal), seeded(Curious)):
        wrapper = bilevel(module, inner="*.weight", outer="*.bias", inner_optimizer=SGD(lr=0.1))
        for hook in ("validation_step", "test_step", "forward", "on_train_epoch_end", "val_dataloader", "log"):
            assert is_overridden(hook, wrapper) == is_overridden(hook, module), hook
    assert type(wrapped()) is type(wrapped())
    with pytest.warns(UserWarning, match=r"^You passed in a `val_dataloader` but have no `validation_step`"):
        trainer(ReverseUnroll()).fit(maml(), listed([tasks(1)]), validation())


class MetricInTraining(Minimal):
    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def training_step(self, batch: Any) -> Tensor:
        prediction = self.head(self.body(batch[0]).tanh())
        self.log("value", self.error(prediction, batch[1]), on_step=True, on_epoch=False)
        self.log("metric", self.error, on_step=True, on_epoch=True)
        return (prediction - batch[1]).square().mean()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES[::3], ids=["reverse", "forward"])
def test_a_metric_in_the_training_step_counts_once_a_step(strategy, stacked):
    module = seeded(MetricInTraining)
    wrapper = bilevel(module, inner="*", outer="*", inner_optimizer=SGD(lr=0.1), inner_steps=2)
    losses = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["outer_loss"].item())
            assert trainer.callback_metrics["value"].item() == pytest.approx(losses[-1], rel=1e-5)
            assert trainer.callback_metrics["metric_step"].item() == pytest.approx(losses[-1], rel=1e-5)

    hypergradient(wrapper, strategy, tasks(2))
    assert module.error._update_count == 0  # which changes nothing in the module
    fit = trainer(copy.deepcopy(strategy), Keep(), HypergradientMonitor(every_n_steps=2))
    fit.fit(wrapper, listed([tasks(3 if stacked else 1)] * 3))
    assert fit.callback_metrics["metric_epoch"].item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_checkpoints(tmp_path):
    wrapper = wrapped(seeded(lambda: Plain(width=7)))
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer(ReverseUnroll(), saver, enable_checkpointing=True).fit(wrapper, loader(), validation())
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    assert checkpoint["hyper_parameters"] == {"width": 7}
    assert set(checkpoint["state_dict"]) == set(wrapper.module.state_dict())
    again = seeded(lambda: Plain(**checkpoint["hyper_parameters"]), 5)
    wrapped(again).load_state_dict(checkpoint["state_dict"])
    assert not differing(parameters(again), parameters(wrapper.module))
    evaluation = trainer(saver, ReverseUnroll(), enable_checkpointing=True)
    evaluation.validate(wrapped(again), validation(), ckpt_path=saver.best_model_path, verbose=False)
    assert set(evaluation.callback_metrics) == {"val_error", "val_loss"}
    predictions = trainer().predict(wrapper, DataLoader(examples(3)[0], batch_size=4))
    wrapper.eval()
    torch.testing.assert_close(torch.cat(predictions), wrapper.module.net(examples(3)[0]).detach())
    message = r"^Cannot use `load_from_checkpoint` of what `bilevel` returned\. .* Use that of the module's own class"
    with pytest.raises(MisconfigurationError, match=message):
        type(wrapper).load_from_checkpoint(saver.best_model_path)


def test_the_modules_own_class_opens_a_checkpoint_of_the_fit(tmp_path):
    wrapper, fit = wrapped(seeded(lambda: Plain(width=7))), trainer(ReverseUnroll())
    fit.fit(wrapper, loader(), validation())
    fit.save_checkpoint(path := tmp_path / "fit.ckpt")
    loaded = Plain.load_from_checkpoint(path)
    assert loaded.hparams == {"width": 7}
    assert not differing(loaded.state_dict(), wrapper.module.state_dict())
    fit.validate(wrapper.module, validation(), verbose=False)
    expected = fit.callback_metrics["val_loss"]
    plain = trainer()
    plain.validate(seeded(Plain, 5), validation(), ckpt_path=path, verbose=False)
    assert torch.equal(plain.callback_metrics["val_loss"], expected)
    predictions = torch.cat(plain.predict(loaded, DataLoader(examples(3)[0], batch_size=4)))
    torch.testing.assert_close(predictions, loaded.eval()(examples(3)[0]))
    exported = torch.export.export(wrapper.module.eval(), (examples(3)[0],)).module()
    torch.testing.assert_close(exported(examples(3)[0]).detach(), predictions)


class Holder(Minimal):
    """Has a child of the name that the wrapper gives the whole, and a checkpoint without its head."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.strict_loading = nn.Linear(1, 1), False

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch) + self.module(batch[0][:, :1]).square().sum()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("head")}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("names", [None, ("module.weight", "module.bias")])
def test_a_state_dict_with_and_without_the_prefix_of_earlier_versions(prefix, names):
    source, target = seeded(Holder), seeded(Holder, 5)
    saved = {prefix + name: value for name, value in source.state_dict().items() if names is None or name in names}
    wrapper = bilevel(target, inner="head", outer=["body", "module"], inner_optimizer=SGD(lr=0.1))
    result = wrapper.load_state_dict(saved, strict=names is None)
    assert not result.unexpected_keys
    assert not set(differing(target.state_dict(), source.state_dict())) & set(names or target.state_dict())


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
def test_a_module_that_saves_a_part_of_itself(tmp_path):
    fit = trainer(ReverseUnroll())
    module = seeded(Holder)
    fit.fit(bilevel(module, inner="head", outer=["body", "module"], inner_optimizer=SGD(lr=0.1)), loader())
    fit.save_checkpoint(tmp_path / "part.ckpt")
    loaded = Holder.load_from_checkpoint(tmp_path / "part.ckpt")
    assert {name.split(".")[0] for name in differing(loaded.state_dict(), module.state_dict())} == {"head"}


def averages() -> list[Any]:
    """Return callbacks that keep an average of the weights, as far as this Lightning has them."""
    ema = getattr(callbacks, "EMAWeightAveraging", None)
    return [lambda: callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)] + [lambda: ema(decay=0.9)] * bool(ema)


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`", "ignore:The dirpath has changed")
@pytest.mark.parametrize("average", averages())
def test_a_fit_with_averaged_weights_resumes_exactly_and_opens(average, tmp_path):
    def fitted(folder: Any, path: Any = None) -> Any:
        saver = ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}")
        wrapper = wrapped()
        fit = trainer(ReverseUnroll(), average(), saver, max_epochs=4, enable_checkpointing=True)
        fit.fit(wrapper, loader(), validation(), ckpt_path=path)
        return wrapper

    whole = fitted("whole")
    resumed = fitted("resumed", tmp_path / "whole" / "epoch=1.ckpt")
    assert not differing(whole.state_dict(), resumed.state_dict())
    saved = Plain.load_from_checkpoint(tmp_path / "whole" / "epoch=3.ckpt")
    assert set(saved.state_dict()) == set(whole.module.state_dict())


class Watched(Plain):
    """Needs its Trainer wherever a hook runs, the last ones too."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["step"] = self.trainer.global_step

    def teardown(self, stage: str) -> None:
        self.hooks.append((stage, self.trainer.global_step))


@pytest.mark.filterwarnings(r"ignore:`?\.fit\(ckpt_path=")  # Lightning looks for a last one, with this callback
@pytest.mark.filterwarnings(r"ignore:Found 1 module\(s\) in eval mode")
@pytest.mark.parametrize("error", [None, ValueError("on purpose"), KeyboardInterrupt()], ids=repr)
def test_nothing_of_a_fit_stays_with_the_module(error, tmp_path):
    def end(*_: Any) -> None:
        if error is not None:
            raise error

    module = seeded(Watched)
    module.net[1].eval()
    module.net[0].bias.requires_grad_(False)
    before, flags = set(vars(module)), {name: p.requires_grad for name, p in module.named_parameters()}
    wrapper = wrapped(module, inner="net.3")
    saver = callbacks.OnExceptionCheckpoint(tmp_path)
    fit = trainer(ReverseUnroll(), callbacks.LambdaCallback(on_train_batch_end=end), saver, enable_checkpointing=True)
    with suppress(ValueError, SystemExit):
        fit.fit(wrapper, loader(), validation())
    assert (tmp_path / "on_exception.ckpt").exists() == (error is not None)
    assert module._trainer is None
    assert set(vars(module)) == before
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert not module.net[1].training
    assert module.net[0].training
    if error is None:
        assert module.hooks[-1] == ("fit", 4)
        fit.validate(wrapper, validation(), verbose=False)
        assert module.hooks[-1][0] == "validate"
    assert module._trainer is None
    hypergradient(wrapper, ReverseUnroll(), next(iter(loader())))
    assert module._trainer is None


def test_copies_and_pickles():
    wrapper = wrapped(inner_optimizer=SGD(lr=0.1), outer="example_weights")
    for copied in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert type(copied) is type(wrapper)
        assert copied.module is not wrapper.module
        assert not differing(parameters(copied), parameters(wrapper))
        assert copied.hparams == {"width": 4}
        trainer(ReverseUnroll()).fit(copied, loader(), validation())
        assert differing(parameters(copied), parameters(wrapper))


class Late(Minimal):
    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            self.body, self.head = nn.Linear(FEATURES, 4), nn.Linear(4, 1)


def test_layers_may_be_built_late():
    wrapper = bilevel(Late(), inner="head", outer="body", inner_optimizer=SGD(lr=0.1))
    trainer(ReverseUnroll()).fit(wrapper, loader())
    assert named(wrapper, "inner") == {"head.weight", "head.bias"}
    wrapper = bilevel(Late(), inner="haed", outer="body", inner_optimizer=SGD(lr=0.1))
    with pytest.raises(
        ValueError, match=r"^Expected `bilevel\(inner=...\)` to be names, .*, got 'haed'. `Late` has body"
    ):
        trainer(ReverseUnroll()).fit(wrapper, loader())
