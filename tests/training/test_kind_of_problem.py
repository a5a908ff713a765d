"""What kind of problem this is, said before hours of training: who judges φ, and how φ acts."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_bilevel import SGD, FirstOrder, ReverseUnroll, audit, bilevel, hypergradient
from tests.support.modules import FEATURES, Cleaning, Maml, episode, listed, loader, tasks, trainer
from tests.support.seeds import seeded

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Penalized(LightningModule):
    """Has hyperparameters of every make beside its layers, and all of them in its training step."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 4), nn.Linear(4, 1)
        self.log_penalty = nn.Parameter(torch.tensor(0.0))
        self.each = nn.ParameterList([nn.Parameter(torch.zeros(4))])
        self.named = nn.ParameterDict({"smoothing": nn.Parameter(torch.zeros(1))})
        self.temperature = Temperature()

    def prediction(self, batch: Any) -> Tensor:
        return self.head(self.body(batch[0]).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.prediction(batch), batch[1])
        own = self.log_penalty.exp() + self.named["smoothing"].sum() + self.temperature.value
        return loss + own * self.head.weight.square().sum() + (self.each[0] * self.head.weight).sum()

    def validation_step(self, batch: Any, index: int) -> Tensor | None:
        return F.mse_loss(self.prediction(batch), batch[1])

    def test_step(self, batch: Any) -> None:
        self.log("test", F.mse_loss(self.prediction(batch), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class Temperature(nn.Module):
    """A layer with a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.0))


def made(outer: Any, module: Any = None, **options: Any) -> Any:
    options = {"inner": "head", "inner_optimizer": SGD(lr=0.1), "inner_start": "reset", **options}
    return bilevel(module or seeded(Penalized), outer=outer, **options)


JUDGED = r"^`bilevel` got no `outer_loss`, so that the `training_step` of `\w+`, with whatever penalty .* also judges "


@pytest.mark.parametrize("outer", ["log_penalty", "each", "named.*", "temperature", ["body", "log_penalty"]])
def test_a_training_step_that_judges_hyperparameters_is_pointed_out(outer: Any) -> None:
    with pytest.warns(UserWarning, match=JUDGED):
        made(outer)


@pytest.mark.parametrize(
    "options",
    [
        {"outer": "body"},
        {"outer": ["body", "head"]},
        {"outer": "*", "inner": "*"},
        {"outer": "log_penalty", "outer_loss": "validation_step"},
        {"outer": "log_penalty", "outer_loss": "training_step"},
        {"outer": "log_penalty", "inner_loss": lambda module, batch: module.training_step(batch, 0)},
    ],
    ids=["layers", "partly shared", "shared", "named", "meant", "another inner loss"],
)
def test_otherwise_nothing_is_said(options: Any) -> None:
    made(**options)


def test_layers_made_in_setup_are_looked_at_when_they_are_there() -> None:
    class Late(Penalized):
        def setup(self, stage: str) -> None:
            self.scale = nn.Parameter(torch.tensor(0.5))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.scale.square() * self.head.weight.square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([self.scale])

    wrapped = made("scale", Late())
    with pytest.warns(UserWarning, match=JUDGED + "scale:"):
        trainer(ReverseUnroll(), max_steps=1).fit(wrapped, loader())


# --- A step as the outer loss ---


def test_a_step_gets_the_number_of_the_batch_by_position() -> None:
    found = hypergradient(made("log_penalty", outer_loss="validation_step"), ReverseUnroll(), episode())
    by_function = made("log_penalty", outer_loss=lambda module, batch: F.mse_loss(module.prediction(batch), batch[1]))
    expected = hypergradient(by_function, ReverseUnroll(), episode())
    assert torch.equal(found.grads["module.log_penalty"], expected.grads["module.log_penalty"])


def test_a_step_that_returns_nothing_says_what_to_do() -> None:
    wrapped = made("log_penalty", outer_loss="test_step")
    message = r"`Penalized\.test_step\(batch\)` to be .*, got None\. Let it return the loss, .*`bilevel\(outer_loss="
    with pytest.raises(ValueError, match=message):
        hypergradient(wrapped, ReverseUnroll(), episode())
    with pytest.warns(UserWarning, match=r"^`training_step` returned `None`") as caught:
        trainer(ReverseUnroll(), max_epochs=1).fit(wrapped, loader())
    (ours,) = [str(each.message) for each in caught if "for a loss did" in str(each.message)]
    assert "`Penalized.test_step(batch)`" in ours


# --- How the outer parameters act ---


class Decoded(Cleaning):
    """Its outer level is read by the outer loss alone."""

    def __init__(self) -> None:
        super().__init__(inner_start="reset")
        self.offset = nn.Parameter(torch.tensor(0.5))

    def inner_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) + self.offset - batch[1]).square().mean()

    def outer_parameters(self) -> Any:
        return [self.offset]

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)


ONE_LEVEL = "The inner problem does not depend on the outer parameters"
KINDS = {
    "an inner loss": (lambda: Cleaning(), "act through the inner problem only."),
    "a start": (lambda: Maml(), "act through the inner problem only."),
    "both": (lambda: made("log_penalty", outer_loss="training_step"), "act through the inner problem, and the outer"),
    "the outer loss": (Decoded, "offset act in the outer loss only, and the inner problem does not depend on them."),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_fit_and_an_audit_say_how_they_act(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, expected = KINDS[name]
    module = seeded(build)
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_LEVEL)
        trainer(FirstOrder() if name == "the outer loss" else ReverseUnroll(), max_steps=2).fit(module, data(name))
    assert len([record for record in caplog.records if expected in record.getMessage()]) == 1
    notes = audit(module, next(iter(data(name))), [ReverseUnroll()], verbose=False).notes
    assert any(expected in note for note in notes)


def data(name: str) -> Any:
    return listed([tasks(2)] * 2) if name == "a start" else loader()


def test_an_inner_problem_without_outer_parameters_is_pointed_out_once() -> None:
    """The mirror image of a hypergradient of zero."""
    with pytest.warns(UserWarning, match=f"^{ONE_LEVEL}") as caught:
        trainer(ReverseUnroll(), max_steps=2).fit(Decoded(), loader())
    assert len([each for each in caught if ONE_LEVEL in str(each.message)]) == 1
    module = Decoded()
    module.allow_unused = True
    trainer(ReverseUnroll(), max_steps=1).fit(module, loader())


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_forgotten_return_is_named_once(level: str) -> None:
    class Forgetful(Cleaning):
        def inner_loss(self, batch: Any) -> Any:
            loss = super().inner_loss(batch)
            return None if level == "inner" else loss

        def outer_loss(self, batch: Any) -> Any:
            loss = super().outer_loss(batch)
            return None if level == "outer" else loss

    with pytest.warns(UserWarning, match="returned `None`") as caught:
        trainer(ReverseUnroll(), max_epochs=1).fit(Forgetful(), loader())
    (ours,) = [str(each.message) for each in caught if "for a loss did" in str(each.message)]
    assert f"`Forgetful.{level}_loss(batch)`" in ours
    assert "Is a `return` missing?" in ours
