"""What a user's loss raises says where: the level, the inner step, and what it was given, with every strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_bilevel import (
    SGD,
    BilevelModule,
    Episode,
    FirstOrder,
    ForwardGradient,
    ImplicitGradient,
    ReverseUnroll,
    ZerothOrder,
    bilevel,
    hypergradient,
)
from lightning_bilevel.modules.whereabouts import Whereabouts
from lightning_bilevel.strategies.table import one_of_each
from tests.support.modules import listed, trainer
from tests.support.seeds import seeded

X, Y = torch.linspace(-1, 1, 15).view(5, 3), torch.tensor([0, 1, 1, 0, 1])


class Bad(Exception):
    """Of the user."""


class Failing(BilevelModule):
    """Raises where a batch says so: ``{"x", "y", "bad"}``, with ``bad`` a tensor that is below zero."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"inner_steps": 4, "inner_start": "reset", **options})
        self.net, self.log_penalty = nn.Linear(3, 2), nn.Parameter(torch.tensor(-1.0))

    def inner_parameters(self) -> Any:
        return self.net

    def loss(self, batch: Any) -> Tensor:
        if batch["x"].shape[0] == 1:  # which vmap lets through
            raise Bad("one example")
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    def inner_loss(self, batch: Any) -> Tensor:
        return self.loss(batch) + self.log_penalty.exp() * self.net.weight.square().sum()

    outer_loss = loss

    def configure_inner_optimizer(self) -> Any:
        return SGD(lr=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.outer_parameters(), lr=0.1)


GOOD, BAD = {"x": X, "y": Y}, {"x": X[:1], "y": Y[:1]}
ONE_STEP = ("FSLA", "SOBA", "MEHA")


def notes(error: Any) -> str:
    return " ".join(getattr(error.value, "__notes__", [str(error.value)]))


@pytest.mark.parametrize("strategy", one_of_each(), ids=lambda strategy: type(strategy).__name__)
def test_of_every_strategy(strategy: Any) -> None:
    kind = type(strategy).__name__
    steps, start = 1 if kind in ONE_STEP else 4, "warm" if kind in (*ONE_STEP, "BOME") else "reset"
    for number in range(steps):
        batches = [GOOD] * steps
        batches[number] = BAD
        with pytest.raises(Bad, match="^one example") as error:
            hypergradient(
                seeded(lambda: Failing(inner_steps=steps, inner_start=start)), strategy, Episode(batches, GOOD)
            )
        assert f"In the inner loss of `Failing`, in inner step {number + 1}, on {{x: float32 (1, 3)" in notes(error)
    with pytest.raises(Bad) as error:
        hypergradient(Failing(inner_steps=steps, inner_start=start), strategy, Episode([GOOD], BAD))
    assert "In the outer loss of `Failing`, after 0 inner steps" in notes(error)  # a first look


class Late(Failing):
    """Its outer loss has no complaint at the start."""

    def outer_loss(self, batch: Any) -> Tensor:
        self.evaluations = getattr(self, "evaluations", 0) + 1
        if self.evaluations > 1:
            raise Bad("later")
        return super().loss(batch)


@pytest.mark.parametrize("strategy", [ReverseUnroll(checkpoint=2), FirstOrder(), ImplicitGradient(), ZerothOrder()])
def test_the_outer_loss_names_the_end_of_the_run(strategy: Any) -> None:
    with pytest.raises(Bad, match="^later") as error:
        hypergradient(Late(), strategy, Episode([GOOD], GOOD))
    assert "In the outer loss of `Late`, after 4 inner steps" in notes(error)


@pytest.mark.parametrize("strategy", [ReverseUnroll(), ForwardGradient(2, mode="forward")], ids=["reverse", "forward"])
def test_in_stacks_of_episodes_and_in_warm_fits(strategy: Any) -> None:
    episode = Episode([GOOD, BAD], GOOD)
    with pytest.raises(Bad) as error:
        hypergradient(Failing(episode_chunk_size=2), strategy, [episode] * 2)
    assert "inner step 2" in notes(error)
    fit = trainer(strategy)
    with pytest.raises(Bad) as error:
        fit.fit(Failing(inner_start="warm"), listed([Episode([GOOD], GOOD), episode]))
    assert "inner step 2" in notes(error)  # of this run, whatever was taken before


def test_in_adapted_and_in_a_wrapped_module() -> None:
    with pytest.raises(Bad) as error, Failing().adapted([GOOD, GOOD, BAD]):
        pass
    assert "In the inner loss of `Failing`, in inner step 3" in notes(error)
    inner = {"inner": "net", "outer": "log_penalty", "inner_optimizer": SGD(lr=0.1)}
    plain = {"inner_loss": "inner_loss", "outer_loss": "loss"}
    wrapped = bilevel(Plain(), **inner, **plain)
    with pytest.raises(Bad) as error:
        hypergradient(wrapped, ReverseUnroll(), Episode([BAD], GOOD))
    assert "In the inner loss of `BilevelPlain`, in inner step 1" in notes(error)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.log_penalty = nn.Linear(3, 2), nn.Parameter(torch.tensor(-1.0))

    loss, inner_loss = Failing.loss, Failing.inner_loss


# --- What first uses go wrong with ---


@pytest.mark.parametrize(
    ("batch", "kind", "hint"),
    [
        (
            {"x": X.double(), "y": Y},
            RuntimeError,
            "It has float64, and the parameters are float32: convert one of them",
        ),
        ({"x": X[:, :2], "y": Y}, RuntimeError, "on {x: float32 (5, 2), y: int64 (5)}"),
        ({"x": X, "y": ["cat", "dog"]}, TypeError, "It has words, such as 'cat': losses compute with numbers"),
        ({"x": X}, KeyError, "on {x: float32 (5, 3)}"),
    ],
    ids=["float64", "features", "labels", "a key"],
)
def test_hints(batch: Any, kind: type[Exception], hint: str) -> None:
    with pytest.raises(kind) as error:
        hypergradient(Failing(), ReverseUnroll(), Episode([batch], GOOD))
    assert hint in notes(error)


def test_an_outer_run_of_its_own() -> None:
    run = Whereabouts("Net")
    run.begin()
    run.took(7)
    run.took(8)
    run.note(error := ValueError(), "outer", None, torch.float32)
    assert "after 2 inner steps, on None." in " ".join(getattr(error, "__notes__", [""]))
