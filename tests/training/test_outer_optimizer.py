"""The optimizer of a wrapped module's outer parameters: given as a factory, or found among the module's own."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from lightning_bilevel import SGD, ReverseUnroll, bilevel
from lightning_bilevel.errors import MisconfigurationError
from lightning_bilevel.training.outer_optimizer import chosen_outer_optimizer
from tests.support.modules import differing, loader, parameters, trainer
from tests.support.seeds import seeded
from tests.support.wrapping import Minimal

Sgd = torch.optim.SGD


class Penalized(Minimal):
    """Its optimizer knows the weights only; the penalty was attached by someone else."""

    def __init__(self) -> None:
        super().__init__()
        self.log_penalty = nn.Parameter(torch.tensor(-2.0))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([*self.body.parameters(), *self.head.parameters()], lr=1e-3)


def penalized(module: Any, batch: Any) -> Any:
    return module.loss(batch) + module.log_penalty.exp() * module.head.weight.square().sum()


def wrap(module: Any, **options: Any) -> Any:
    defaults = {"inner": "head", "outer": ["body", "log_penalty"], "inner_optimizer": SGD(lr=0.1), "inner_steps": 2}
    return bilevel(module, **{**defaults, "inner_loss": penalized, "outer_loss": "loss", **options})


def scheduled(params: Any) -> Any:
    optimizer = Sgd(params, lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}}


def of_module(module: Any) -> Any:
    return Sgd([{"params": module.body.parameters()}, {"params": [module.log_penalty], "lr": 0.5}], lr=0.1)


GIVEN: dict[str, tuple[Any, list[float]]] = {
    "partial": (functools.partial(Sgd, lr=0.1), [0.1]),
    "class": (Sgd, [1e-3]),
    "function": (lambda params: Sgd(params, lr=0.1), [0.1]),
    "function of the module": (of_module, [0.1, 0.5]),
    "with a schedule": (scheduled, [0.1 / 2**4]),
    "lists": (lambda params: ([optimizer := Sgd(params, lr=0.1)], [ExponentialLR(optimizer, 0.5)]), [0.05]),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_steps_the_outer_parameters(name):
    given, rates = GIVEN[name]
    module = seeded(Penalized)
    before = parameters(module)
    fit = trainer(ReverseUnroll())
    fit.fit(wrap(module, outer_optimizer=given), loader())
    [optimizer] = fit.optimizers
    assert type(optimizer) is Sgd
    assert [group["lr"] for group in optimizer.param_groups] == rates
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in (*module.body.parameters(), module.log_penalty)}
    assert {"body.weight", "log_penalty"} <= set(differing(parameters(module), before))


def test_a_copy_and_a_pickle_step_their_own_parameters():
    wrapper = wrap(seeded(Penalized), outer_optimizer=functools.partial(Sgd, lr=0.1))
    before = parameters(wrapper)
    for copied in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        trainer(ReverseUnroll()).fit(copied, loader())
        assert "body.weight" in differing(parameters(copied), before)
    assert not differing(parameters(wrapper), before)


def test_an_instance_is_taken_and_follows_a_copy():
    module = seeded(Penalized)
    wrapper = wrap(module, outer_optimizer=Sgd([*module.body.parameters(), module.log_penalty], lr=0.1))
    copied, before = copy.deepcopy(wrapper), parameters(module)
    trainer(ReverseUnroll()).fit(copied, loader())
    assert not differing(parameters(module), before)
    trainer(ReverseUnroll()).fit(wrapper, loader())
    assert not differing(parameters(module), parameters(copied.module))
    assert "log_penalty" in differing(parameters(module), before)


def test_a_fit_goes_on_from_a_checkpoint_with_its_outer_optimizer(tmp_path):
    fitted = []
    for path, epochs in ((None, 2), (None, 1), (tmp_path / "one.ckpt", 2)):
        fit = trainer(ReverseUnroll(), max_epochs=epochs)
        wrapper = wrap(seeded(Penalized), outer_optimizer=lambda params: torch.optim.Adam(params, lr=0.1))
        fit.fit(wrapper, loader(), ckpt_path=path)
        fit.save_checkpoint(tmp_path / "one.ckpt")
        fitted.append(parameters(wrapper))
    assert not differing(fitted[0], fitted[2])
    assert differing(fitted[1], fitted[2])


class Parts(Minimal):
    """Two optimizers, in any of the forms that Lightning takes, over what requires gradients then."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def configure_optimizers(self) -> Any:
        trained = [filter(lambda p: p.requires_grad, part.parameters()) for part in (self.head, self.body)]
        return self.form(Sgd(trained[0], lr=0.1), Sgd(trained[1], lr=0.2))


def step(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}


def by_epoch(optimizer: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1)}


def by_metric(optimizer: Any) -> dict[str, Any]:
    """A schedule that needs a name beside it."""
    return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer, patience=0), "monitor": "loss"}


FORMS: dict[str, tuple[Any, int]] = {
    "list": (lambda a, b: [a, b], 0),
    "tuple": (lambda a, b: (a, b), 0),
    "no schedules": (lambda a, b: ([a, b], []), 0),
    "schedules of both": (lambda a, b: ([a, b], [step(a), step(b), StepLR(a, 1)]), 1),
    "two of one": (lambda a, b: ([a, b], [step(b), ExponentialLR(b, 0.9)]), 2),
    "one schedule": (lambda a, b: ([a, b], StepLR(a, 1)), 0),
    "dicts": (lambda a, b: [by_epoch(a), {"optimizer": b, "lr_scheduler": step(b)}], 1),
    "with frequencies": (lambda a, b: ({"optimizer": a, "frequency": 5}, {"optimizer": b, "frequency": 1}), 0),
    "with a monitor": (lambda a, b: [{"optimizer": a}, by_metric(b)], 1),
}


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_of_several_the_one_with_outer_parameters_is_taken_with_its_schedules(form, manual):
    build, schedules = FORMS[form]
    module = seeded(lambda: Parts(build))
    module.automatic_optimization = not manual
    fit = trainer(ReverseUnroll())
    losses = {"inner_loss": "loss", "outer_loss": "loss"} if manual else {"inner_loss": None, "outer_loss": None}
    if form == "with a monitor" and manual:
        losses["outer_loss"] = lambda module, batch: module.log("loss", 1.0) or module.loss(batch)
    fit.fit(wrap(module, outer="body", **losses), loader())
    [optimizer] = fit.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, module.body.parameters())
    )
    assert len(fit.lr_scheduler_configs) == schedules
    assert all(config.scheduler.optimizer is optimizer for config in fit.lr_scheduler_configs)
    assert differing(parameters(module), parameters(seeded(lambda: Parts(build))))


def test_other_callbacks_see_the_schedule_that_is_kept(tmp_path):
    monitor = LearningRateMonitor("step")
    module = seeded(lambda: Parts(FORMS["schedules of both"][0]))
    fit = trainer(ReverseUnroll(), monitor, logger=CSVLogger(tmp_path))
    fit.fit(wrap(module, outer="body", inner_loss=None, outer_loss=None), loader())
    assert list(monitor.lrs) == ["lr-SGD"]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two that hold some": (
        lambda: Parts(lambda a, b: [a, b]),
        {"outer": ["head", "body"], "inner": "*"},
        r"Cannot use `bilevel` with the 2 optimizers that `Parts.configure_optimizers\(\)` returns. This is because "
        r"2 of them have outer parameters, and Lightning steps one: head.weight, .*. Pass `bilevel\(outer_optimizer=",
    ),
    "one that holds none": (
        lambda: Parts(lambda a, b: a),
        {"outer": "body"},
        r"Cannot use `bilevel` with the optimizer that `Parts.configure_optimizers\(\)` returns. This is because it "
        r"has none of the outer parameters: body.weight, body.bias. Pass `bilevel\(outer_optimizer=functools.partial",
    ),
    "none": (
        lambda: Parts(lambda a, b: None),
        {"outer": "body"},
        r"`Parts` has no optimizer of the outer parameters: `Parts.configure_optimizers\(\)` returns none. Pass `bi",
    ),
    "given, of none": (
        lambda: Parts(lambda a, b: b),
        {"outer": "body", "outer_optimizer": lambda params: Sgd([torch.zeros(1, requires_grad=True)])},
        r"Cannot use `bilevel` with the optimizer that `outer_optimizer\(params\)` returns. This is because it has",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_in_the_fit_name_the_argument(name):
    build, options, message = REFUSED[name]
    wrapper = wrap(seeded(build), **{"inner_loss": None, "outer_loss": None, **options})
    with pytest.raises(MisconfigurationError, match=f"^{message}"):
        trainer(ReverseUnroll()).fit(wrapper, loader())
    assert all(p.requires_grad for p in wrapper.parameters())


def test_a_module_without_an_optimizer_of_its_own_is_asked_for_one():
    class Bare(LightningModule):
        pass

    with pytest.raises(MisconfigurationError, match=r"^`Bare` has no optimizer of the outer parameters: `Bare\.conf"):
        chosen_outer_optimizer(Bare(), None, [])


def test_a_form_that_lightning_does_not_know_is_refused():
    message = r"^Expected `outer_optimizer\(params\)` to be an optimizer, or another form .*, got <light"
    with pytest.raises(ValueError, match=message):
        chosen_outer_optimizer(Minimal(), lambda params: SGD(lr=0.1), [])


@pytest.mark.parametrize("given", [0.1, "adam", SGD(lr=0.1), SGD, functools.partial(SGD, lr=0.1), {"optimizer": Sgd}])
def test_what_can_be_no_outer_optimizer_is_refused_at_once(given):
    message = r"^Expected `bilevel\(outer_optimizer=...\)` to be a `torch.optim` class, a partial .* Write `functools."
    with pytest.raises(ValueError, match=message):
        wrap(Penalized(), outer_optimizer=given)


def test_outer_parameters_without_the_optimizer_are_named():
    message = r"^No optimizer has the outer parameters \['module.log_penalty'\].* Pass `bilevel\(outer_optimizer=...\)`"
    with pytest.warns(UserWarning, match=message):
        trainer(ReverseUnroll()).fit(wrap(seeded(Penalized)), loader())


def test_a_factory_of_lightning_cli():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--optimizer", type=OptimizerCallable)
    arguments = parser.parse_args(["--optimizer=torch.optim.RMSprop", "--optimizer.lr=0.3"])
    with warnings.catch_warnings():  # the method has another name in later versions
        warnings.simplefilter("ignore")
        factory = parser.instantiate_classes(arguments).optimizer
    fit = trainer(ReverseUnroll())
    fit.fit(wrap(seeded(Penalized), outer_optimizer=factory), loader())
    [optimizer] = fit.optimizers
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.RMSprop, 0.3)
