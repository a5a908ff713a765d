"""Names are looked up when the layers are there: those that the module's hooks make, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn

from lightning_bilevel import SGD, ReverseUnroll, audit, bilevel, hypergradient
from lightning_bilevel.training.selection import made_later, matching
from tests.support.modules import FEATURES, Calls, differing, loader, parameters, tasks, trainer
from tests.support.seeds import seeded
from tests.support.wrapping import Minimal


class Data(LightningDataModule):
    outputs = 1

    def train_dataloader(self) -> Any:
        return loader()


class OnSetup(Minimal):
    """Sizes its head by the data."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.body = nn.Linear(FEATURES, 4)

    def setup(self, stage: str) -> None:
        self.head = nn.Linear(4, self.trainer.datamodule.outputs)


class Placeholder(OnSetup):
    """Has the name already, but nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential()

    def setup(self, stage: str) -> None:
        self.head.append(nn.Linear(4, 1))


class Replaced(OnSetup):
    """Exchanges layers that were there."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)


class OnConfigure(OnSetup):
    def setup(self, stage: str) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 1)


LATE: dict[str, tuple[Any, Any]] = {
    "setup": (OnSetup, lambda module: "head"),
    "pattern": (OnSetup, lambda module: ["head.*"]),
    "placeholder": (Placeholder, lambda module: module.head),
    "replaced": (Replaced, lambda module: module.head),
    "configure_model": (OnConfigure, lambda module: "head.weight"),
}


@pytest.mark.parametrize("name", LATE)
def test_layers_that_hooks_make_are_found_in_the_fit(name):
    build, select = LATE[name]
    module = seeded(build)
    wrapper = bilevel(module, inner=select(module), outer="body", inner_optimizer=SGD(lr=0.1), inner_steps=2)
    for wrapped in (wrapper, copy.deepcopy(wrapper)):
        steps = Calls(parameters)
        trainer(ReverseUnroll(), steps).fit(wrapped, datamodule=Data())
        changed = {name.split(".")[0] for name in differing(steps.seen[0], steps.seen[-1])}
        assert changed == {"body", "head"}


@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize("build", [OnSetup, OnConfigure])
def test_a_name_that_still_matches_nothing_is_an_error_of_the_fit(build, level):
    names = {"inner": "head", "outer": "body", level: "haed"}
    wrapper = bilevel(seeded(build), **names, inner_optimizer=SGD(lr=0.1))
    message = rf"^Expected `bilevel\({level}=...\)` to be names, .*, got 'haed'. `{build.__name__}` has body.weight, "
    with pytest.raises(ValueError, match=message):
        trainer(ReverseUnroll()).fit(wrapper, datamodule=Data())


def test_without_a_fit_the_hook_is_named():
    wrapper = bilevel(seeded(OnSetup), inner="head", outer="body", inner_optimizer=SGD(lr=0.1))
    message = r"got 'head'. `OnSetup` has body.weight, body.bias; what `setup` makes is there once it was called.$"
    for use in (lambda: hypergradient(wrapper, ReverseUnroll(), tasks(1)), lambda: audit(wrapper, tasks(1))):
        with pytest.raises(ValueError, match=message):
            use()


def test_frozen_layers_of_a_hook_are_an_error_of_the_fit():
    class Frozen(OnConfigure):
        def configure_model(self) -> None:
            super().configure_model()
            self.head.requires_grad_(False)

    wrapper = bilevel(seeded(Frozen), inner="head", outer="body", inner_optimizer=SGD(lr=0.1))
    with pytest.raises(ValueError, match=r"^Expected `bilevel\(inner=...\)` to be parameters of `Frozen` that require"):
        trainer(ReverseUnroll()).fit(wrapper, loader())


def test_hooks_that_may_make_layers():
    class Both(OnConfigure):
        def setup(self, stage: str) -> None: ...

    expected = ["", "`setup`", "`setup` or `configure_model`"]
    assert [made_later(kind()) for kind in (Minimal, OnSetup, Both)] == expected
    module = Minimal()
    module.setup = lambda stage: None
    assert made_later(module) == "`setup`"


def test_each_parameter_is_selected_once():
    module = Minimal()
    assert [id(p) for p in matching(module, "inner", ["head", "*.weight", "head.bias"])] == [
        id(p) for p in (module.head.weight, module.head.bias, module.body.weight)
    ]


def test_a_second_fit_has_the_metrics_of_its_own_setup():
    from torchmetrics import MeanSquaredError

    class Metric(Minimal):
        def setup(self, stage: str) -> None:
            self.error = MeanSquaredError()

        def on_train_batch_end(self, *_: Any) -> None:
            self.error(torch.ones(2), torch.zeros(2))
            self.log("error", self.error)

    wrapper = bilevel(seeded(Metric), inner="head", outer="body", inner_optimizer=SGD(lr=0.1))
    for _ in range(2):
        fit = trainer(ReverseUnroll())
        fit.fit(wrapper, loader())
        assert fit.callback_metrics["error"] == 1


LAZY: dict[str, Any] = {
    "linear": lambda: nn.LazyLinear(4),
    "batch norm": lambda: nn.LazyBatchNorm1d(),
    "buffers only": lambda: nn.LazyBatchNorm1d(affine=False),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("levels", [("net.1", "net.0"), ("net.0", "net.1"), ("net.0.weight", "net.0.bias")])
def test_lazy_layers_are_named_until_they_have_shapes(lazy, levels):
    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(FEATURES, 4), LAZY[lazy](), nn.Linear(4, 1))

        def training_step(self, batch: Any) -> Any:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    if lazy == "buffers only" and "net.1" in levels:
        pytest.skip("it has no parameters")
    module = seeded(Net)
    wrapper = bilevel(module, inner=levels[0], outer=levels[1], inner_optimizer=SGD(lr=0.1), inner_start="reset")
    uses = {
        "fit": lambda: trainer(ReverseUnroll()).fit(wrapper, loader()),
        "hypergradient": lambda: hypergradient(wrapper, ReverseUnroll(), tasks(1)),
        "audit": lambda: audit(wrapper, tasks(1), [ReverseUnroll()]),
        "adapted": lambda: wrapper.adapted(tasks(1)[0].inner).__enter__(),
    }
    message = r"^`BilevelNet` has no shapes yet for module\.net\.1\..*, which lazy layers take"
    for use in uses.values():
        with pytest.raises(RuntimeError, match=message):
            use()
    module.net(tasks(1)[0].outer[0])
    hypergradient(wrapper, ReverseUnroll(), tasks(1))
    trainer(ReverseUnroll()).fit(wrapper, loader())
