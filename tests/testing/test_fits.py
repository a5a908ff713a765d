"""Properties of a strategy in a Trainer: each fails on a fake that lacks it, and says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bilevel import FirstOrder, HypergradientStrategy, tree
from lightning_bilevel.errors import combination_error
from lightning_bilevel.problem import BilevelProblem, Carry, Episode, Hypergradient
from lightning_bilevel.randomness import Call
from lightning_bilevel.testing import fits as properties
from lightning_bilevel.tree import Params


def fails(name: str, fake: HypergradientStrategy, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^`{type(fake).__name__}\(.*\)` fails `{name}`: {message}"):
        getattr(properties, name)(fake)


class Average(FirstOrder):
    """The running mean of all estimates, carried as it should be."""

    supports_stacking = False

    def estimate(self, problem: BilevelProblem, carry: Carry, phi: Params, episode: Episode, call: Call) -> Any:
        result = super().estimate(problem, carry, phi, episode, call)
        last = carry.strategy
        count = int(last["count"]["count"]) + 1 if last else 1
        mean = last["mean"] if last else tree.zeros_like(phi)
        mean = tree.add(mean, tree.sub(result.grads, mean), alpha=1 / count)
        return result._replace(grads=mean, kept=self.keep(mean, count, phi))

    def keep(self, mean: Params, count: int, phi: Params) -> Any:
        return {"mean": tree.map(torch.clone, mean), "count": {"count": torch.tensor(count)}}


EVERY = ["carries_its_state", "resumes", "accumulates", "stays_frozen_in_a_fit"]


@pytest.mark.parametrize("name", EVERY)
def test_a_strategy_with_state(name: str) -> None:
    getattr(properties, name)(Average())


# --- What is carried ---


class Remembering(FirstOrder):
    """The same running mean, on the object."""

    def __init__(self) -> None:
        self.mean: Params | None = None

    def estimate(self, *args: Any) -> Hypergradient:
        result = super().estimate(*args)
        last = result.grads if self.mean is None else self.mean
        self.mean = tree.add(tree.scale(last, 0.5), result.grads, alpha=0.5)
        return result._replace(grads=self.mean)


def test_what_is_on_the_object_is_lost_in_a_resume() -> None:
    fails("resumes", Remembering(), r"parameters and buffers differ after a resume")
    fails("stays_frozen_in_a_fit", Remembering(), r"a fit changes `mean` of the strategy")


class Alias(Average):
    """φ is stepped in place, and what is carried with it."""

    def keep(self, mean: Params, count: int, phi: Params) -> Any:
        return {**super().keep(mean, count, phi), "phi": phi}


class WithGraph(Average):
    def keep(self, mean: Params, count: int, phi: Params) -> Any:
        return {**super().keep(mean, count, phi), "phi": tree.map(lambda v: v.clone().requires_grad_(), phi)}


class Numbers(Average):
    def keep(self, mean: Params, count: int, phi: Params) -> Any:
        return {"mean": tree.map(torch.clone, mean), "count": {"count": count}}


class Flat(Average):
    def keep(self, mean: Params, count: int, phi: Params) -> Any:
        return {**super().keep(mean, count, phi), "norm": tree.norm(mean)}


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (Alias(), r"a fit of three steps: the carried `phi` of `weights` is off by "),
        (WithGraph(), r"`kept\['phi'\]\['weights'\]` has a graph"),
        (Numbers(), r"`kept\['count'\]\['count'\]` is 1, not a tensor"),
        (Flat(), r"`kept\['norm'\]` is a `Tensor`, not a tree of tensors"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_carried(fake: HypergradientStrategy, message: str) -> None:
    fails("carries_its_state", fake, message)


# --- The Trainer ---


class Doubling(FirstOrder):
    """Changes gradients behind the estimate's back."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        for parameter in pl_module.outer_parameters():
            parameter.grad.mul_(2)


def test_what_happens_beside_the_estimate() -> None:
    fails("carries_its_state", Doubling(), r"a fit of three steps: φ of `weights` is off by ")
    fails("accumulates", Doubling(), r"a fit with `accumulate_grad_batches=2`: φ of `weights` is off by ")


class OneByOne(Average):
    def trainer_refusals(self, trainer: Any) -> Any:
        if trainer.accumulate_grad_batches == 1:
            return []
        return [combination_error("`OneByOne` with accumulation", "it counts", "Use larger batches")]


class OnlyInWords(OneByOne):
    def all_trainer_refusals(self, trainer: Any) -> Any:
        return [] if trainer.state.fn == "fit" else super().all_trainer_refusals(trainer)


def test_refusals_of_trainers() -> None:
    properties.accumulates(OneByOne())
    message = r"`trainer_refusals` refuses accumulation, and a fit does not: Cannot use `OneByOne` with accumulation"
    fails("accumulates", OnlyInWords(), message)


class HoldsTheTrainer(FirstOrder):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.stage = stage


def test_what_a_fit_leaves_behind() -> None:
    fails("stays_frozen_in_a_fit", HoldsTheTrainer(), r"a fit changes `stage` of the strategy")


def test_fits_are_silent_and_write_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in EVERY:
        getattr(properties, name)(FirstOrder())
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
